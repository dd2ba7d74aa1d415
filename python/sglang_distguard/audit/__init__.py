"""Finds the process-globals that change while real runners are built and run, and those that could.

``observe`` reads a running process, ``sources`` reads SGLang's text. ``runs`` builds runners under
observation, and ``processes`` gives each run its own process. ``findings`` joins their results with
the table in ``hooks.process_globals``. ``report`` prints the findings, and ``ledger`` compares them
with what is known of an SGLang version.
"""

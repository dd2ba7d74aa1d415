"""Finds process-globals: what changes while real runners are built and run, and what could.

``observe`` looks at a running process, ``sources`` at SGLang's text, ``runs`` builds runners under
observation, ``processes`` does so in processes of their own, ``findings`` joins both with ``treatments``,
``report`` prints, ``ledger`` compares with what is known of an SGLang version.
"""

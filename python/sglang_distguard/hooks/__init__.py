"""What the guard changes, one module per SGLang, torch or standard-library module that it patches.

Each lists its ``CHANGES``. A hook asks the registry, calls the original and undoes what a failed original
left; it keeps no state of its own. ``process_globals`` is the table of SGLang's process-globals and their
treatments, ``unmanaged_globals`` its rows that need none, ``versions`` chooses what fits the installed SGLang.
"""

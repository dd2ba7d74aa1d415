"""Hooks: one module per SGLang, torch or standard-library module that the guard patches.

Each hook module lists its ``CHANGES``. A hook asks the registry, calls the original and undoes what
a failed original left. It keeps no state of its own. ``process_globals`` is the table of SGLang's
process-globals and their treatments. ``unmanaged_globals`` has the rows of that table that need no
treatment. ``versions`` chooses the hooks that fit the installed SGLang.
"""

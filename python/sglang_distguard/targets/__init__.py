"""What distguard changes, one module per SGLang, torch or standard-library module it hooks.

Each lists its ``CHANGES``. A hook asks the registry, calls the original and undoes what a failed
original left; it keeps no state of its own.
"""

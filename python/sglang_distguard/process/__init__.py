"""What exists once per process: the installed hooks, and what becomes of them at fork and exit."""

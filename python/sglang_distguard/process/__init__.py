"""State that exists once per process: the installed hooks, and their handling of fork and exit."""

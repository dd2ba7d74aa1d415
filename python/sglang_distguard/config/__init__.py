"""Settings in force, the checks of arguments, and names for runners that were given none."""

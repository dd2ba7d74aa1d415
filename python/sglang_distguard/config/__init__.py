"""Settings in force, checks of arguments, and default names of runners."""

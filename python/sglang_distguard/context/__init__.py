"""State of the running code: its scope, environment, default dtype and flags of torch."""

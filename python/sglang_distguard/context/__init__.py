"""What belongs to the running code: its scope, environment, default dtype and flags of torch's."""

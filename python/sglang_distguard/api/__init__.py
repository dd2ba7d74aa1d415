"""What users call: build, activate, close, look, tear down. The package itself exports it."""

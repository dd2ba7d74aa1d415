"""The functions that users call: build, activate, close, inspect, tear down.

The package itself exports them.
"""

"""Waits of threads for each other: single-flight, the phase lock, and the event log."""

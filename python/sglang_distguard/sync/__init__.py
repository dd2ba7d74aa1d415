"""Threads that wait for each other: single-flight, the phase lock, and the log of decisions."""

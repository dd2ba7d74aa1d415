"""Several ranks agree through their world's store before anything is created.

``log`` has the ranks and the log that they share; ``agreement`` asks, takes turns and reports the
outcome. ``creation`` has names and deadlines of what is created in a turn, ``specs`` the values
that must be equal, ``failures`` the log entries and errors for what went wrong. At world size 1
none of them is used.
"""

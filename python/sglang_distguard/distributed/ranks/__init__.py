"""Several ranks: what they agree on through their world's store before anything is created.

``log`` (the ranks, and the log that they share), ``agreement`` (ask, take turns, report the outcome),
``creation`` (names and deadlines of what is created in a turn), ``specs`` (what must be equal),
``failures`` (what went wrong, as a line in the log and as an error). At world size 1 none is used.
"""

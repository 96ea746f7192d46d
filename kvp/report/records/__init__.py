"""The records of runs, and what may be compared."""

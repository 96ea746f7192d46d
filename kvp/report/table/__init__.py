"""Tables of the records of runs."""

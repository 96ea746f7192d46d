"""Recovery: a little training after the cut."""

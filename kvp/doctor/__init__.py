"""Report of what works here, what is missing, and how to get it."""

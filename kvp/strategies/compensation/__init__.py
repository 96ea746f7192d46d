"""What the kept weights can do for those that were cut."""

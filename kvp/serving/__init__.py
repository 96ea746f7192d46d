"""Checkpoints for engines that know nothing of kvp."""

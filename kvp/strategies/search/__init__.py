"""Searches for a plan that survive a kill."""

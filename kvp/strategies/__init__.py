"""Strategies: from a model to a plan."""

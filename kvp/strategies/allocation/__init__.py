"""Allocation: the part of the budget that each part of a model gives."""

"""How much of the budget each part of a model gives."""

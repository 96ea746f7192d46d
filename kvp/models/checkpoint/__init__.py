"""A checkpoint directory, checked before it is opened."""

"""Hydra finds plugins in this namespace only; what they do is in `kvp.sweep`."""

"""Hydra takes plugins from this namespace only; what they do is in `kvp.sweep`."""

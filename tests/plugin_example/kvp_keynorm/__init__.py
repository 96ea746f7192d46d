"""A plugin of kvp: KV groups by the norm of their keys, and what goes with it."""

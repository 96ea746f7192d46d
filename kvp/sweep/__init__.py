"""Sweeps: many runs over one store, by one command that can be killed and repeated.

`jobs` says which, `census` what stands already, `worker` runs one of them in whatever process a launcher
gives it, `sweep` puts a header before and a table after.
"""

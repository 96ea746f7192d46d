"""Plots of the records of runs."""

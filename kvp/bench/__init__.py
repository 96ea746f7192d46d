"""Benchmarks that are commands: they print figures and judge nothing."""

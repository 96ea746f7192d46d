"""Bytes and arithmetic that work will take, from a config alone: no weights, no modelling code."""

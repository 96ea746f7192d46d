"""Costs of running a checkpoint: throughput, memory and counts."""

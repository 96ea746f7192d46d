"""Answers before anything is computed: does a model fit, what does pruning it take."""

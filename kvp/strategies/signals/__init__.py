"""Signals: measurements of a model's weights, and of the model on calibration text."""

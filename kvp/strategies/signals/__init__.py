"""What calibration text and weights tell of a model."""

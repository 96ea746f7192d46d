"""Text: corpora, calibration samples and training examples."""

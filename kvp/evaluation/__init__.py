"""Quality of a model: perplexity, zero-shot accuracy, needles in long texts."""

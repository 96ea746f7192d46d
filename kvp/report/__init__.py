"""From run records to what people read."""

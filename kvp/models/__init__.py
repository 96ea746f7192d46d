"""Decoders seen as spaces, and the surgery that cuts them."""

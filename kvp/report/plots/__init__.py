"""From records to plots."""

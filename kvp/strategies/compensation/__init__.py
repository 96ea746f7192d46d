"""Compensation: kept weights make up for those that were cut."""

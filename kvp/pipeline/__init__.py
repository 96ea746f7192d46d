"""The way from a configuration to a record: the experiment, its stages, and the run."""

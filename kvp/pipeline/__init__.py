"""From a configuration to a record: the experiment, its stages, and the run."""

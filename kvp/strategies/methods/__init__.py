"""One method, one file, one class; none imports another."""

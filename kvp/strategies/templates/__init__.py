"""Templates: the classes that methods of one kind derive from."""

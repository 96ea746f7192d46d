"""A benchmark of exports in a server, under one cache memory for all."""

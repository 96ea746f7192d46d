"""A benchmark in llama.cpp."""

"""What a checkpoint costs to run: throughput, memory and counts."""

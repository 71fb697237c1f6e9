"""What `scripts/benchmark` can be asked for: a module for each command."""

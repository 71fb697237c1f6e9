"""Starting a Triton server on this model repository."""

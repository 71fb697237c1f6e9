"""How a request travels to a server and its answer back. Not public."""

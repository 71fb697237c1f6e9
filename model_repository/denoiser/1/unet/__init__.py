"""The network: one forward, exact for rows of different lengths."""

"""Sounds as files: the formats, and what a file says about its origin. Client and stages share it."""

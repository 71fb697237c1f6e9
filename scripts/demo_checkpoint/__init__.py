"""A small AudioLDM 2 that is trained here, on sounds that are synthesised here, to show the server at work."""

"""Trials of a server: hostile requests, long mixed load, and faults under load."""

"""Measurements that anyone can repeat."""

from project import add_stages_to_path

add_stages_to_path()

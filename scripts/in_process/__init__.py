"""The server without Triton: `stages.Stages`, a request's way through all stages of one process, in 60 lines."""

from project import add_stages_to_path

add_stages_to_path()

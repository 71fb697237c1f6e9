"""A server that is to stop: the models that requests reach first refuse new ones, and go on with those inside."""

import os
from typing import Final

from audioldm2_triton.errors import UnavailableError

FILE_VARIABLE: Final = "AUDIOLDM2_DRAINING_FILE"
"""The environment variable with the path of a file that `scripts/serve` makes when the server is to stop."""


def check_open() -> None:
    """Raises `UnavailableError` if the server takes no new requests."""
    path = os.environ.get(FILE_VARIABLE)
    if path and os.path.exists(path):
        raise UnavailableError("the server is shutting down; try again")

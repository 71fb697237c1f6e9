"""How a server fails, for programs that start one and have only the client installed."""

from typing import Final

DRAIN_TIMEOUT_IN_S: Final = 30.0


class ServerError(RuntimeError):
    """The server did not start, failed too often, or lost requests when it stopped."""

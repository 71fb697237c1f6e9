"""Keepalive: what makes a connection fail whose other end has vanished without a word.

gRPC pings by itself, in HTTP/2; for HTTP the operating system does, in TCP. Without either, a call that has no timeout
would wait for ever.
"""

import socket
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from aiohttp import TCPConnector

IDLE_IN_S: Final = 60
"""A Triton that `scripts/serve` did not start ends a gRPC call after three pings if it has sent nothing meanwhile."""
PATIENCE_IN_S: Final = 20
_PROBES: Final = 4  # of TCP, within the patience
LONGEST_RECONNECT_DELAY_IN_S: Final = 1
"""gRPC's own is 120 s, beside which the pauses between two attempts of a request would mean nothing."""


def channel_options() -> list[tuple[str, int]]:
    """Returns options for a gRPC channel: pings, and reconnecting soon after the server is back."""
    return [
        ("grpc.keepalive_time_ms", 1000 * IDLE_IN_S),
        ("grpc.keepalive_timeout_ms", 1000 * PATIENCE_IN_S),
        ("grpc.http2.ping_timeout_ms", 1000 * PATIENCE_IN_S),  # which newer releases mind instead
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000 * LONGEST_RECONNECT_DELAY_IN_S),
    ]


def keep_alive(connected: socket.socket) -> None:
    """Has the operating system probe a connection that is silent."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": IDLE_IN_S, "TCP_KEEPINTVL": PATIENCE_IN_S // _PROBES, "TCP_KEEPCNT": _PROBES}
    for name, value in options.items():
        if hasattr(socket, name):  # macOS has other names for some
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def keep_alive_all(connector: "TCPConnector") -> None:
    """Does so with each connection that aiohttp makes; before 3.12 it cannot."""
    connector._socket_factory = _kept_alive


def _kept_alive(address: Any) -> socket.socket:
    made = socket.socket(*address[:3])
    keep_alive(made)
    return made

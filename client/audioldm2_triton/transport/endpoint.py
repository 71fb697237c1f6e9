"""The address of a server, parsed from its URL."""

import os
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from audioldm2_triton.errors import invalid
from audioldm2_triton.transport import keepalive

API_KEY_HEADER: Final = "api-key"
API_KEY_VARIABLE: Final = "AUDIOLDM2_API_KEY"

DEFAULT_URL: Final = "grpc://localhost:8001"

# Triton itself speaks no TLS over HTTP, so behind https:// there is a gateway, on the usual port.
_DEFAULT_PORTS: Final = {"grpc": 8001, "grpcs": 8001, "http": 8000, "https": 443}
_LARGEST_MESSAGE: Final = 2**31 - 1  # of protobuf
_EXPECTED: Final = "grpc://HOST[:8001], grpcs://HOST[:8001], http://HOST[:8000] or https://HOST[:443]"


@dataclass(frozen=True)
class Endpoint:
    """One server as `tritonclient` wants it."""

    url: str  # as given, for messages
    protocol: str  # "grpc" or "http"
    tls: bool
    address: str  # HOST:PORT, for HTTP with the base path if there is one
    is_loopback: bool  # whether the host is this machine
    api_key: str = ""  # without which the server refuses; empty: none

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request; another dictionary each time, because `tritonclient` adds its own to it."""
        # Triton takes a header for a key over gRPC with this prefix.
        prefix = "triton-grpc-protocol-" if self.protocol == "grpc" else ""
        return {f"{prefix}{API_KEY_HEADER}": self.api_key} if self.api_key else {}

    @property
    def channel_options(self) -> list[tuple[str, int]]:
        """Options for gRPC: messages of any size, keepalive, and no proxy between this machine and itself."""
        options = [(f"grpc.max_{way}_message_length", _LARGEST_MESSAGE) for way in ("send", "receive")]
        options += keepalive.channel_options()
        # gRPC obeys http_proxy for the loopback too, unless no_proxy names it. HTTP clients here obey neither.
        return [*options, ("grpc.enable_http_proxy", 0)] if self.is_loopback else options

    @property
    def proxy(self) -> str:
        """The variable of the environment that names the proxy of a gRPC channel, in its order; empty: there is none.

        HTTP clients here obey none.
        """
        if self.protocol != "grpc" or self.is_loopback:
            return ""
        return next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), "")


def parse_url(url: str, api_key: str | None = None) -> Endpoint:
    """Parses a URL. Raises `InvalidArgumentError` for another scheme, no host, or parts that have no meaning.

    Args:
        api_key: by default what the environment says.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:  # the port is no number, or the brackets of an IPv6 address do not match
        raise invalid("url", url, _EXPECTED) from None
    if port is None or not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
        raise invalid("url", url, _EXPECTED)
    protocol = parts.scheme.removesuffix("s")
    path = parts.path.rstrip("/")
    if path and protocol == "grpc":
        raise invalid("url", url, f"no path after the host: {_EXPECTED}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(
        url,
        protocol,
        tls=parts.scheme.endswith("s"),
        address=f"{host}:{port}{path}",
        is_loopback=_is_loopback(parts.hostname),
        api_key=os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"

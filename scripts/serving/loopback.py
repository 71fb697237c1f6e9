"""Pages of a server on this machine."""

import urllib.request
from collections.abc import Mapping
from typing import Final

# http_proxy is for requests that leave this machine; a server on this machine is not behind the proxy.
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_ALL_ADDRESSES: Final = ("0.0.0.0", "::")


def read_page(
    port: int,
    path: str,
    timeout: float,
    host: str = "localhost",
    headers: Mapping[str, str] | None = None,
    post: bytes | None = None,
) -> bytes:
    """Returns the body of `path`, of a server that listens on `host`; asks by POST if there is something to post.

    Raises `OSError` if no server answers, or it answers with an error.
    """
    name = "localhost" if host in _ALL_ADDRESSES else f"[{host}]" if ":" in host else host
    request = urllib.request.Request(f"http://{name}:{port}{path}", post, dict(headers or {}))
    with _OPENER.open(request, timeout=timeout) as answer:
        body: bytes = answer.read()
    return body

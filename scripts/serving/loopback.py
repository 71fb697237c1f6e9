"""Pages of a server on this machine."""

import urllib.request
from typing import Final

# http_proxy is for the way out of this machine; a server on the loopback is not behind the proxy.
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_page(port: int, path: str, timeout: float) -> bytes:
    """The body of `path`. Raises `OSError` where no server answers, or answers with an error."""
    with _OPENER.open(f"http://localhost:{port}{path}", timeout=timeout) as answer:
        body: bytes = answer.read()
    return body

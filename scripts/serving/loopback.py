"""Pages of a server on this machine."""

import urllib.request
from typing import Final

# http_proxy is for requests that leave this machine; a server on the loopback is not behind the proxy.
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_page(port: int, path: str, timeout: float) -> bytes:
    """Returns the body of `path`. Raises `OSError` if no server answers, or it answers with an error."""
    with _OPENER.open(f"http://localhost:{port}{path}", timeout=timeout) as answer:
        body: bytes = answer.read()
    return body

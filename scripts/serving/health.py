"""The health of a server as its supervisor sees it, on an address of its own that answers from the first second.

Triton's own readiness stays true when a stage has died (before 26.04) or is stopped (all releases).
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from audioldm2_triton.server import metric_names as names
from serving.control_group import host_memory

STARTING: Final = "starting"
READY: Final = "ready"
UNLOADED: Final = "unloaded"  # a model was unloaded by request, or a newly loaded one is not ready
RESTARTING: Final = "restarting"
DRAINING: Final = "draining"
STOPPED: Final = "stopped"
STATES: Final = (STARTING, READY, UNLOADED, RESTARTING, DRAINING, STOPPED)


@dataclass
class Health:
    """The state of a server; written by the supervisor, read by whoever asks."""

    state: str = STARTING
    reason: str = ""  # of the last restart
    restarts: int = 0

    def page(self) -> str:
        return json.dumps({"state": self.state, "restarts": self.restarts, "reason": self.reason}) + "\n"

    def metrics(self) -> str:
        memory = host_memory()
        states = {f'{names.SERVER_STATE}{{state="{state}"}}': int(self.state == state) for state in STATES}
        families = (
            (names.SERVER_READY, "gauge", "Whether the server takes requests.", int(self.state == READY)),
            (names.SERVER_STATE, "gauge", "1 for the state that the server is in, 0 for the others.", states),
            (names.SERVER_RESTARTS_TOTAL, "counter", "Restarts of a server that had failed.", self.restarts),
            (names.MEMORY_USED_BYTES, "gauge", "Memory in use, of the container or the machine.", memory.used),
            (names.MEMORY_LIMIT_BYTES, "gauge", "Memory that the container or the machine has.", memory.limit),
        )
        lines: list[str] = []
        for name, kind, meaning, value in families:
            samples = value if isinstance(value, dict) else {name: value}
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{series} {number}" for series, number in samples.items()]
        return "\n".join(lines) + "\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps those who did not wait for the answer out of the log."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def health_server(health: Health, host: str, port: int) -> Iterator[None]:
    """Answers `/live` with 200, `/ready` with 200 or 503, and `/metrics`. Raises `OSError` if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages = {
                "/live": (200, health.page()),
                "/ready": (200 if health.state == READY else 503, health.page()),
                "/metrics": (200, health.metrics()),
            }
            code, body = pages.get(self.path, (404, "got an unknown path but expected /live, /ready or /metrics\n"))
            content = body.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4" if "metrics" in self.path else "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Keeps the probes of every few seconds out of the log."""

    with _Server((host, port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()

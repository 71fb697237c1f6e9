"""A stand-in for an OpenTelemetry collector: keeps the spans that are posted to it, OTLP over HTTP.

Triton's come in JSON, those of the models in protobuf.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATH = "/v1/traces"


@dataclass
class Collector:
    url: str = ""
    spans: list[dict[str, Any]] = field(default_factory=list)
    services: set[str] = field(default_factory=set)

    def take(self, body: bytes, content_type: str) -> None:
        for of_resource in (json.loads(body) if "json" in content_type else _decode(body))["resourceSpans"]:
            known = {each["key"]: each["value"].get("stringValue") for each in of_resource["resource"]["attributes"]}
            self.services.add(known["service.name"])
            self.spans += [span for of_scope in of_resource["scopeSpans"] for span in of_scope["spans"]]

    def of_trace(self, trace: str) -> dict[str, list[dict[str, Any]]]:
        """Returns the spans of a trace by their names."""
        found: dict[str, list[dict[str, Any]]] = {}
        for span in self.spans:
            if span["traceId"] == trace:
                found.setdefault(span["name"], []).append(span)
        return found


def _decode(body: bytes) -> dict[str, Any]:
    """Returns what the same would be in JSON, where ids are in hexadecimal, not in base64 as in any other message."""
    decoded = MessageToDict(ExportTraceServiceRequest.FromString(body))
    for of_resource in decoded["resourceSpans"]:
        for span in (span for of_scope in of_resource["scopeSpans"] for span in of_scope["spans"]):
            for name in ("traceId", "spanId", "parentSpanId"):
                span[name] = base64.b64decode(span[name]).hex()
    return decoded


@contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if self.path == PATH else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            if self.path == PATH:
                collector.take(body, self.headers["Content-Type"])

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}{PATH}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""The parts of a request as OpenTelemetry's spans; Triton's own cover only `execute()`, which returns at once.

Sent when a request ends, as OTLP in JSON over HTTP, to where OpenTelemetry's own environment variable says.
"""

import json
import logging
import os
import re
import secrets
import time
import urllib.request
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Final

from audioldm2_triton.server.reports import Reports
from audioldm2_triton.server.request_record import RequestRecord, outcome_name

ENDPOINT_VARIABLE: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
"""With the URL of a collector, such as `http://localhost:4318/v1/traces`."""
SERVICE_VARIABLE: Final = "OTEL_SERVICE_NAME"
TIMEOUT_IN_S: Final = 5.0
MAX_UNSENT: Final = 1000  # requests, for a collector that does not answer

_INTERNAL: Final = 1  # a span's kind
_ERROR: Final = 2  # a status
_TRACEPARENT: Final = re.compile(
    r"[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<parent>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_SAMPLED: Final = 1  # a flag

logger = logging.getLogger(__name__)


def trace_request(record: RequestRecord, outcome: object, ended_ns: int) -> None:
    """Sends the spans of a request that has ended, in a thread, if there is a collector and its trace is sampled."""
    url = os.environ.get(ENDPOINT_VARIABLE, "")
    if url and record.ends_with(outcome) and (spans := spans_of(record, outcome, ended_ns)):
        _sending().put(partial(_send, url, spans), MAX_UNSENT)


def spans_of(record: RequestRecord, outcome: object, ended_ns: int) -> list[dict[str, Any]]:
    """Returns a span for each known part of a request; none if its trace is not sampled, or is no trace.

    They are children of what `traceparent` names: of Triton's span of this model where Triton traces too.
    """
    named = _TRACEPARENT.match(record.traceparent)
    if not named or not int(named["flags"], 16) & _SAMPLED:
        return []
    to_epoch = time.time_ns() - time.monotonic_ns()
    parts = record.journal.parts(ended_ns)
    known = {"audioldm2.model": record.door, "audioldm2.request_id": record.request_id}
    spans: list[dict[str, Any]] = [
        {
            "traceId": named["trace"],
            "spanId": secrets.token_hex(8),
            "parentSpanId": named["parent"],
            "name": f"audioldm2.{part}",
            "kind": _INTERNAL,
            "startTimeUnixNano": str(begin + to_epoch),
            "endTimeUnixNano": str(end + to_epoch),
            "attributes": _attributes(known),
        }
        for part, (begin, end) in parts.items()
    ]
    if spans and isinstance(outcome, BaseException):
        spans[-1]["status"] = {"code": _ERROR, "message": outcome_name(outcome)}
    return spans


def close_spans() -> None:
    """Sends what is left."""
    if _sending.cache_info().currsize:
        _sending().close()


@cache
def _sending() -> Reports:
    return Reports("spans")


def _attributes(known: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": name, "value": {"stringValue": value}} for name, value in known.items()]


def _send(url: str, spans: list[dict[str, Any]]) -> None:
    resource = {"attributes": _attributes({"service.name": os.environ.get(SERVICE_VARIABLE, "audioldm2")})}
    scoped = [{"scope": {"name": "audioldm2_triton"}, "spans": spans}]
    body = json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": scoped}]}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_IN_S):
            pass
    except OSError as error:
        logger.warning("the spans of a request could not be sent to %s: %s", url, error)

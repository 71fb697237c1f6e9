"""The parts and the steps of a request as OpenTelemetry's spans; Triton's own cover only `execute()`, which returns at once.

Sent by OpenTelemetry's library, which reads where to and how from its own environment variables.
"""

import os
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Final

from audioldm2_triton.server.request_record import TRACEPARENT, RequestRecord, outcome_name

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE_VARIABLE: Final = "OTEL_SERVICE_NAME"
CLOSE_TIMEOUT_IN_S: Final = 2.0  # a collector that does not answer must not hold up the exit


def are_wanted() -> bool:
    return any(os.environ.get(name) for name in ENDPOINT_VARIABLES)


def trace_request(record: RequestRecord, outcome: object, ended_ns: int) -> None:
    """Has the spans of a request that has ended in this model sent, by a thread, if there is a collector."""
    if are_wanted():
        make_spans(_provider().get_tracer("audioldm2_triton"), record, outcome, ended_ns)


def make_spans(tracer: "Tracer", record: RequestRecord, outcome: object, ended_ns: int) -> None:
    """Makes a span for each step in this model, and where the request ends, for each known part of it.

    They are children of what `traceparent` names: of Triton's span of this model where Triton traces too. None if its
    trace is not sampled, or is no trace.
    """
    from opentelemetry.trace import Status, StatusCode, get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({TRACEPARENT: record.traceparent})
    parent = get_current_span(context).get_span_context()
    if not (parent.is_valid and parent.trace_flags.sampled):
        return
    to_epoch = time.time_ns() - time.monotonic_ns()
    known = {"audioldm2.model": record.door, "audioldm2.request_id": record.request_id}
    for number, step in enumerate(record.steps, start=1):
        attributes = {**known, "audioldm2.step": number, "audioldm2.rows": step.rows}
        tracer.start_span(
            "audioldm2.step", context, attributes=attributes, start_time=step.began_ns + to_epoch
        ).end(step.ended_ns + to_epoch)
    if not record.ends_with(outcome):
        return
    parts = record.journal.parts(ended_ns)
    for part, (began_ns, part_ended_ns) in parts.items():
        span = tracer.start_span(
            f"audioldm2.{part}", context, attributes=known, start_time=began_ns + to_epoch
        )
        if isinstance(outcome, BaseException) and part == list(parts)[-1]:
            span.set_status(Status(StatusCode.ERROR, outcome_name(outcome)))
        span.end(part_ended_ns + to_epoch)


def close_spans() -> None:
    """Sends what is left, if the collector takes it in time."""
    if _provider.cache_info().currsize:
        closing = threading.Thread(target=_provider().shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_IN_S)
        _provider.cache_clear()


@cache
def _provider() -> "TracerProvider":
    # Imported where it is needed: most servers have no collector.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    service = os.environ.get(SERVICE_VARIABLE) or "audioldm2"
    # At exit it would wait for a collector that does not answer.
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider

"""The parts and the steps of a request as OpenTelemetry's spans.

Triton's own cover only `execute()`, which returns at once. These are made and sent by a thread when a request ends, by
OpenTelemetry's library, which reads where to and how from its own environment variables.
"""

import os
import threading
import time
from functools import cache, partial
from typing import TYPE_CHECKING, Final

from audioldm2_triton.server.reports import Reports
from audioldm2_triton.server.request_record import TRACEPARENT, RequestRecord, outcome_name

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
QUEUE_VARIABLE: Final = "OTEL_BSP_MAX_QUEUE_SIZE"
MAX_UNSENT: Final = 1000  # requests, of which the spans are not made yet
MAX_UNSENT_SPANS: Final = 50_000  # the library's own 2,048 are the steps of ten requests
CLOSE_TIMEOUT_IN_S: Final = 2.0  # a collector that does not answer must not hold up the exit


def are_wanted() -> bool:
    return any(os.environ.get(name) for name in ENDPOINT_VARIABLES)


def trace_request(record: RequestRecord, outcome: object, ended_ns: int) -> None:
    """Has the spans of a request that has ended in this model made and sent, if there is a collector."""
    is_end = record.ends_with(outcome)
    if are_wanted() and (record.steps or is_end):
        # Not the error itself, whose frames hold what it came through.
        error = outcome_name(outcome) if isinstance(outcome, BaseException) else ""
        _making().put(partial(_trace, record, ended_ns if is_end else 0, error), MAX_UNSENT)


def _trace(record: RequestRecord, ended_ns: int, error: str) -> None:
    make_spans(_provider().get_tracer("audioldm2_triton"), record, ended_ns, error)


def make_spans(tracer: "Tracer", record: RequestRecord, ended_ns: int, error: str = "") -> None:
    """Makes a span for each step in this model, and for each known part of a request.

    They are children of what `traceparent` names: of Triton's span of this model where Triton traces too. None if its
    trace is not sampled, or is no trace.

    Args:
        ended_ns: when the request ended; 0: not here, so that it has no parts.
        error: the reason why the last part failed; empty: it did not.
    """
    from opentelemetry.trace import Status, StatusCode, get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({TRACEPARENT: record.traceparent})
    parent = get_current_span(context).get_span_context()
    if not (parent.is_valid and parent.trace_flags.sampled):
        return
    to_epoch = time.time_ns() - time.monotonic_ns()
    known: dict[str, str | int] = {"audioldm2.model": record.door, "audioldm2.request_id": record.request_id}
    for number, step in enumerate(record.steps, start=1):
        attributes = known | {"audioldm2.forward": number, "audioldm2.rows": step.rows}
        began_ns, step_ended_ns = step.began_ns + to_epoch, step.ended_ns + to_epoch
        tracer.start_span("audioldm2.step", context, attributes=attributes, start_time=began_ns).end(step_ended_ns)
    parts = record.journal.parts(ended_ns) if ended_ns else {}
    for part, (begin, end) in parts.items():
        span = tracer.start_span(f"audioldm2.{part}", context, attributes=known, start_time=begin + to_epoch)
        if error and part == list(parts)[-1]:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(end + to_epoch)


def close_spans() -> None:
    """Makes and sends what is left, if the collector takes it in time."""
    if _making.cache_info().currsize:
        _making().close()
        _making.cache_clear()
    if _provider.cache_info().currsize:
        closing = threading.Thread(target=_provider().shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_IN_S)
        _provider.cache_clear()


@cache
def _making() -> Reports:
    return Reports("spans")


@cache
def _provider() -> "TracerProvider":
    # Imported where it is needed: most servers have no collector.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "audioldm2"}).merge(OTELResourceDetector().detect())
    # At exit it would wait for a collector that does not answer.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    unsent = None if os.environ.get(QUEUE_VARIABLE) else MAX_UNSENT_SPANS
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), max_queue_size=unsent))
    return provider

"""The spans of a request without a server: its parts and steps, under the trace that it belongs to."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.server import spans as spans_module
from audioldm2_triton.server.journal import Journal
from audioldm2_triton.server.request_record import RequestRecord, StepTime
from audioldm2_triton.server.spans import close_spans, make_spans, trace_request
from collector import running_collector
from supervised_server import wait_until

WHOLE = Journal(1, 2, 4, 8)
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    close_spans()


def record_of(model: str = "decoder", traceparent: str = SAMPLED, journal: Journal = WHOLE) -> RequestRecord:
    record = RequestRecord(model, "a-7", traceparent)
    record.journal = journal
    return record


def spans(record: RequestRecord, ended_ns: int = 16, error: str = "") -> list[ReadableSpan]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    make_spans(provider.get_tracer("test"), record, ended_ns, error)
    return list(exporter.get_finished_spans())


def durations(found: list[ReadableSpan]) -> list[int]:
    return [(span.end_time or 0) - (span.start_time or 0) for span in found]


def test_a_span_for_each_part() -> None:
    found = spans(record_of())
    assert [span.name for span in found] == [f"audioldm2.{part}" for part in ("text", "queue", "denoising", "decoding")]
    parents = [span.parent for span in found if span.parent is not None]
    assert {(f"{parent.trace_id:032x}", f"{parent.span_id:016x}") for parent in parents} == {(TRACE, PARENT)}
    assert len(parents) == 4
    assert durations(found) == [1, 2, 4, 8]
    assert {span.status.status_code for span in found} == {StatusCode.UNSET}


def test_a_span_for_each_step_in_the_denoiser_alone() -> None:
    record = record_of("denoiser")
    record.steps = [StepTime(4, 5, 2), StepTime(5, 8, 16)]
    found = spans(record, ended_ns=0)
    assert [span.name for span in found] == ["audioldm2.step"] * 2
    assert durations(found) == [1, 3]
    known = [span.attributes or {} for span in found]
    assert [(each["audioldm2.forward"], each["audioldm2.rows"]) for each in known] == [(1, 2), (2, 16)]


def test_the_part_that_failed_says_so() -> None:
    found = spans(record_of(journal=Journal(1, 2, 4)), error="unavailable")
    assert [span.status.description for span in found] == [None, None, "unavailable"]
    assert found[-1].status.status_code is StatusCode.ERROR


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "rain",
        "a-b-c-d",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-00",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
    ],
)
def test_what_is_no_sampled_trace_has_no_spans(traceparent: str) -> None:
    assert spans(record_of(traceparent=traceparent)) == []


@pytest.mark.parametrize("service", ["audioldm2", "music"])
def test_a_collector_gets_them(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.removesuffix("/v1/traces"))
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
        if service == "music":
            monkeypatch.setenv("OTEL_SERVICE_NAME", service)
        failed = record_of("denoiser", journal=Journal(1, 2, 4))
        failed.steps = [StepTime(4, 5, 2)]
        trace_request(failed, UnavailableError("full"), 16)
        trace_request(record_of("denoiser"), object(), 16)  # whose request goes on
        wait_until(lambda: "audioldm2.denoising" in collector.of_trace(TRACE), "the last span")
        found = collector.of_trace(TRACE)
        assert {*found} == {f"audioldm2.{part}" for part in ("text", "queue", "denoising", "step")}
        assert found["audioldm2.denoising"][0]["status"]["message"] == "unavailable"
        assert collector.services == {service}


def test_without_a_collector_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in spans_module.ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    trace_request(record_of(), None, 16)
    assert spans_module._making.cache_info().currsize == 0

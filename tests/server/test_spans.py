"""The spans of a request without a server: its parts, under the trace that it belongs to."""

from typing import Any

import pytest

from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.server.journal import Journal
from audioldm2_triton.server.request_record import RequestRecord
from audioldm2_triton.server.spans import spans_of

WHOLE = Journal(1, 2, 4, 8)
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def spans(traceparent: str, outcome: object = None, journal: Journal = WHOLE) -> list[dict[str, Any]]:
    record = RequestRecord("decoder", "a-7", traceparent)
    record.journal = journal
    return spans_of(record, outcome, ended_ns=16)


def test_a_span_for_each_part() -> None:
    found = spans(f"00-{TRACE}-{PARENT}-01")
    assert [span["name"] for span in found] == [
        f"audioldm2.{part}" for part in ("text", "queue", "denoising", "decoding")
    ]
    assert {(span["traceId"], span["parentSpanId"]) for span in found} == {(TRACE, PARENT)}
    assert len({span["spanId"] for span in found}) == 4
    assert [int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"]) for span in found] == [1, 2, 4, 8]
    assert not any("status" in span for span in found)


def test_the_part_that_failed_says_so() -> None:
    found = spans(f"00-{TRACE}-{PARENT}-01", UnavailableError("full"), Journal(1, 2, 4))
    assert [span.get("status") for span in found] == [None, None, {"code": 2, "message": "unavailable"}]


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
    assert spans(traceparent) == []

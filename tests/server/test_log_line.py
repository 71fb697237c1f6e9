"""The line of a request without a server: what it says, what it never says, and its JSON."""

import json
import logging

import pytest

from audioldm2_triton.errors import OUT_OF_MEMORY, UnavailableError, invalid
from audioldm2_triton.server.journal import Journal
from audioldm2_triton.server.request_log import JsonFormatter, describe, log_outcome
from audioldm2_triton.server.request_record import RequestRecord, read_traceparent

SECOND = 1_000_000_000
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record(model: str = "decoder", **known: object) -> RequestRecord:
    made = RequestRecord(model, "a-7", **known)  # type: ignore[arg-type]
    made.journal = Journal(SECOND, 2 * SECOND, 4 * SECOND, 8 * SECOND, 1, 3, 20, 2560)
    return made


def test_what_is_known_of_a_request() -> None:
    assert describe(record(traceparent=TRACE), {}, 16 * SECOND) == {
        "request_id": "a-7",
        "request_model": "audioldm2",
        "outcome": "success",
        "prompts": 1,
        "waveforms": 3,
        "steps": 20,
        "audio_seconds": 2.56,
        "duration_seconds": 15,
        "text_seconds": 1,
        "queue_seconds": 2,
        "denoising_seconds": 4,
        "decoding_seconds": 8,
        "traceparent": TRACE,
    }


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "transcription"])
def test_a_text_that_is_refused_is_not_shown(name: str) -> None:
    error = invalid(name, "secret but expected\nsecret", "at most 3 characters, not 6")
    known = describe(record("text_conditioning"), error, 16 * SECOND)
    assert known["error"] == f"InvalidArgumentError: `{name}`: got a text but expected at most 3 characters, not 6"
    assert known["outcome"] == "invalid_argument"


def test_other_values_that_are_refused_are_shown() -> None:
    known = describe(record(), invalid("scheduler", "Euler", "another"), 16 * SECOND)
    assert "got 'Euler' but expected another" in known["error"]


def test_outcomes_are_named_as_in_the_metrics() -> None:
    outcomes = (UnavailableError("full"), MemoryError(), ValueError("a bug"))
    names = [describe(record(), outcome, 16 * SECOND)["outcome"] for outcome in outcomes]
    assert names == ["unavailable", OUT_OF_MEMORY, "internal"]


@pytest.mark.parametrize(
    ("model", "door"),
    [
        ("music_decoder", "music_audioldm2"),
        ("text_conditioning", "audioldm2"),
        ("music_audioldm2_stream", "music_audioldm2_stream"),
    ],
)
def test_the_model_that_the_client_called(model: str, door: str) -> None:
    assert RequestRecord(model).door == door


@pytest.mark.parametrize(
    ("model", "is_part", "outcome", "lines"),
    [
        ("decoder", False, {}, 1),
        ("audioldm2_stream", False, {}, 1),
        ("denoiser", False, {}, 0),
        ("denoiser", False, UnavailableError("full"), 1),
        ("decoder", True, {}, 0),
        ("denoiser", True, UnavailableError("full"), 0),
    ],
)
def test_the_one_line_comes_from_where_the_request_ends(
    model: str, is_part: bool, outcome: object, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        log_outcome(record(model, is_part=is_part), outcome, 16 * SECOND)
    assert len(caplog.records) == lines


def test_a_line_is_one_line_of_json(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_outcome(record(), UnavailableError("two\nlines"), 16 * SECOND)
    (event,) = caplog.records
    line = JsonFormatter("decoder").format(event)
    assert "\n" not in line
    read = json.loads(line)
    assert (read["level"], read["model"], read["request_id"]) == ("WARNING", "decoder", "a-7")
    assert read["denoising_seconds"] == 4
    assert read["message"].startswith("request 'a-7' failed: UnavailableError: two\nlines; ")


def test_an_exception_is_in_the_json(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("a bug")
    except ValueError:
        logging.getLogger("any").exception("it failed")
    (event,) = caplog.records
    assert "ValueError: a bug" in json.loads(JsonFormatter("decoder").format(event))["exception"]


def test_where_the_traceparent_comes_from() -> None:
    other = TRACE.replace("00f067aa0ba902b7", "b7ad6b7169203331")
    assert read_traceparent({}, None) == ""
    assert read_traceparent({"TraceParent": TRACE}, None) == TRACE
    assert read_traceparent({"traceparent": TRACE}, json.dumps({"traceparent": other})) == other
    assert len(read_traceparent({"traceparent": "a" * 1000}, None)) == 100

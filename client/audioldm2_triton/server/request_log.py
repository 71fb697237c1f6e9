"""One line in the server's log for each request that a client sent: its id, its size, its times, how it ended."""

import json
import logging
import re
import time
from typing import Any, Final

from audioldm2_triton.server.request_record import RequestRecord, outcome_name

_LONGEST_ID: Final = 100  # characters: a client may send any number
_FIELDS: Final = "fields"
# What `errors.invalid` shows of a text is for the client alone.
_SHOWN_TEXT: Final = re.compile(r"(`(?:prompt|negative_prompt|transcription)`: got ).*(?= but expected )", re.DOTALL)

logger = logging.getLogger(__name__)


def log_outcome(record: RequestRecord, outcome: object, ended_ns: int) -> None:
    """Logs how a request ended in a model: an error wherever it happened, an answer if it is the client's.

    Not for the calls of `audioldm2_stream` to the stages, which are parts of a request that it logs itself.
    """
    if not record.ends_with(outcome):
        return
    known = describe(record, outcome, ended_ns)
    level = logging.WARNING if isinstance(outcome, BaseException) else logging.INFO
    logger.log(level, "%s", _sentence(known), extra={_FIELDS: known})


def describe(record: RequestRecord, outcome: object, ended_ns: int) -> dict[str, Any]:
    """Returns what is known of a request, without any text that it has brought."""
    journal = record.journal
    known: dict[str, Any] = {"request_id": record.request_id[:_LONGEST_ID], "request_model": record.door}
    known["outcome"] = outcome_name(outcome)
    if isinstance(outcome, BaseException):
        message = _SHOWN_TEXT.sub(r"\1a text", str(outcome))
        known["error"] = f"{type(outcome).__name__}: {message}"
    if journal.prompts:
        size = {"prompts": journal.prompts, "waveforms": journal.waveforms, "steps": journal.steps}
        known |= {**size, "audio_seconds": journal.audio_ms / 1000}
    known["duration_seconds"] = round((ended_ns - journal.arrived_ns) / 1e9, 3)
    if record.first_audio_ns:
        known["first_audio_seconds"] = round((record.first_audio_ns - journal.arrived_ns) / 1e9, 3)
    for part, (begin, end) in journal.parts(ended_ns).items():
        known[f"{part}_seconds"] = round((end - begin) / 1e9, 3)
    if record.traceparent:
        known["traceparent"] = record.traceparent
    return known


def _sentence(known: dict[str, Any]) -> str:
    """Says it on one line; whatever a client sent is in quotes."""
    name = f"request {known['request_id']!r}" if known["request_id"] else "a request without an id"
    end = f"failed: {known['error']}" if "error" in known else "is done"
    said = {"request_id", "error"}
    rest = " ".join(f"{key}={value!r}" for key, value in known.items() if key not in said)
    return f"{name} {end}; {rest}"


class JsonFormatter(logging.Formatter):
    """Makes a JSON object of each event, on one line."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "model": self._model,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


def direct_log(model: str, log_format: str) -> None:
    """Directs the log of a model's process to the server's, in text or JSON."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {model}: %(message)s")
    if log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter(model))

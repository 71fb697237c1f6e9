"""What a model knows of a request while it has it, for the log line and the metrics at its end."""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from audioldm2_triton.contract import ENSEMBLE, STREAM
from audioldm2_triton.errors import OUT_OF_MEMORY, AudioLDM2Error, InternalError
from audioldm2_triton.server.journal import Journal, read_journal
from audioldm2_triton.server.memory import is_out_of_memory
from audioldm2_triton.server.stage_tensors import CANCEL, DECODER, DENOISER, PROGRESS, TEXT_CONDITIONING

SUCCESS: Final = "success"
TRACEPARENT: Final = "traceparent"
"""The header of W3C Trace Context, and the request parameter that carries it."""
_LONGEST_TRACEPARENT: Final = 100  # characters; those of today have 55


@dataclass(frozen=True)
class StepTime:
    """A step of a request, on the monotonic clock, and the UNet batch items of its forward, of all requests."""

    began_ns: int
    ended_ns: int
    rows: int


@dataclass
class RequestRecord:
    """One request in one model. Whoever works on it writes here what it learns."""

    model: str
    request_id: str = ""
    traceparent: str = ""
    control: str = ""
    is_part: bool = False  # of a stream, which logs and measures the whole
    arrived_ns: int = field(default_factory=time.monotonic_ns)  # at this model
    first_audio_ns: int = 0  # when a stream's was sent
    steps: list[StepTime] = field(default_factory=list)  # where they are traced
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.arrived_ns)

    @property
    def door(self) -> str:
        """The model that the client called, if it is one of the two public ones."""
        for stage in (TEXT_CONDITIONING, DENOISER, DECODER):
            if self.model.endswith(stage):
                return self.model.removesuffix(stage) + (STREAM if self.is_part else ENSEMBLE)
        return self.model

    @property
    def gives_the_answer(self) -> bool:
        """Whether this model's answer is the client's; that of any other is on its way to the next one."""
        return not self.is_part and self.model.endswith((DECODER, STREAM))

    @property
    def is_stream(self) -> bool:
        return self.model.endswith(STREAM)

    @property
    def is_watched(self) -> bool:
        """Whether its time is that of work, not of waiting for news of another's."""
        return self.control not in (PROGRESS, CANCEL)

    def ends_with(self, outcome: object) -> bool:
        """Whether the client's request ends with this outcome: an error wherever it happens, or the answer."""
        return not self.is_part and (isinstance(outcome, BaseException) or self.gives_the_answer)

    def read(self, tensor: np.ndarray | None) -> None:
        """Reads the journal of an earlier stage."""
        self.journal = read_journal(tensor, self.arrived_ns)

    def learn(self, tensor: np.ndarray) -> None:
        """Reads the journal in a stage's answer to this model, where the request has arrived before."""
        self.journal = replace(read_journal(tensor, self.arrived_ns), arrived_ns=self.arrived_ns)

    def admitted(self) -> None:
        self.journal = replace(self.journal, admitted_ns=time.monotonic_ns())

    def stepped(self, seconds: float, rows: int) -> None:
        """Notes that a step has just ended, and how long its forward took."""
        now = time.monotonic_ns()
        self.steps.append(StepTime(now - int(1e9 * seconds), now, rows))

    def sent(self, names: Collection[str]) -> None:
        """Notes the moments that the parts of a stream's answer tell of; only the first of each kind counts."""
        if "audio" in names and not self.first_audio_ns:
            self.first_audio_ns = time.monotonic_ns()
        if "step" in names and not self.journal.admitted_ns:
            self.admitted()  # the denoiser tells the right moment at its end, if it gets there


def outcome_name(outcome: object) -> str:
    """Returns the label of an outcome in the metrics: `success`, or the reason of an error."""
    if not isinstance(outcome, BaseException):
        return SUCCESS
    if not isinstance(outcome, AudioLDM2Error) and is_out_of_memory(outcome):
        return OUT_OF_MEMORY
    return str(getattr(outcome, "reason", InternalError.reason))


def read_traceparent(parameters: Mapping[str, Any], context: str | None) -> str:
    """Returns the traceparent of a request; empty if it has none.

    Args:
        parameters: of the request, among which Triton puts the headers that it forwards.
        context: of Triton's own trace, in JSON, which is closer to this model than what the client sent.
    """
    own = json.loads(context).get(TRACEPARENT) if context else None
    sent = (value for name, value in parameters.items() if name.lower() == TRACEPARENT)
    return str(own or next(sent, ""))[:_LONGEST_TRACEPARENT]

"""perf_analyzer's export of every request: when it was sent and when it was answered."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Answered:
    """One request, in seconds on a clock of its own."""

    sent: float
    answered: float

    @property
    def latency(self) -> float:
        return self.answered - self.sent


def read_profile_export(path: Path) -> list[Answered]:
    """The answered requests in the order they were sent; one without an answer is left out.

    Raises `ValueError` for a file with anything but one experiment.
    """
    experiments = json.loads(path.read_text())["experiments"]
    if len(experiments) != 1:
        raise ValueError(f"{path}: got {len(experiments)} experiments but expected 1")
    requests = [
        Answered(request["timestamp"] / NS_PER_S, request["response_timestamps"][-1] / NS_PER_S)
        for request in experiments[0]["requests"]
        if request["response_timestamps"]
    ]
    return sorted(requests, key=lambda request: request.sent)


def throughput(requests: Sequence[Answered]) -> float:
    """Answers per second, from the first that was sent to the last answer."""
    return len(requests) / _duration(requests)


def goodput(requests: Sequence[Answered], objective_s: float) -> float:
    """Answers within the objective per second of the same time; the late ones count for nothing."""
    return sum(request.latency <= objective_s for request in requests) / _duration(requests)


def _duration(requests: Sequence[Answered]) -> float:
    if not requests:
        raise ValueError("requests: got none but expected at least one answer")
    return max(request.answered for request in requests) - min(request.sent for request in requests)

"""What a server's own metrics say about the time between two looks at its page."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from audioldm2_triton.server.metric_names import (
    REQUEST_QUEUE_SECONDS,
    REQUESTS_TOTAL,
    ROWS_PER_FORWARD,
    STAGE_INFO,
    STEP_DURATION_SECONDS,
)

_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Change:
    """What a server has done meanwhile, for whichever client; None: nothing of the kind."""

    rows_per_forward: float | None
    step_ms: float | None  # from one forward to the next, the mean
    waited_ms: float | None  # of a request for its first step, the mean
    ended: Mapping[str, int]  # requests by outcome

    def __str__(self) -> str:
        words = [f"{count} {outcome}" for outcome, count in self.ended.items()]
        words += [f"waited {self.waited_ms:.0f} ms"] if self.waited_ms is not None else []
        words += [f"{self.step_ms:.0f} ms a forward"] if self.step_ms is not None else []
        return f"server: {', '.join(words)}" if words else ""


def change(before: Mapping[str, float], after: Mapping[str, float]) -> Change:
    """Compares two pages as `read_metrics` returns them; what a server of another release lacks is left out."""

    def more(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    def mean(name: str) -> float | None:
        count = more(f"{name}_count")
        return more(f"{name}_sum") / count if count else None

    ended: dict[str, int] = {}
    for name in after:
        outcome = dict(_LABEL.findall(name)).get("outcome")
        if outcome and name.startswith(f"{REQUESTS_TOTAL}{{") and more(name):
            ended[outcome] = ended.get(outcome, 0) + round(more(name))
    step_s, waited_s = mean(STEP_DURATION_SECONDS), mean(REQUEST_QUEUE_SECONDS)
    return Change(
        rows_per_forward=mean(ROWS_PER_FORWARD),
        step_ms=None if step_s is None else 1000 * step_s,
        waited_ms=None if waited_s is None else 1000 * waited_s,
        ended=ended,
    )


def denoiser_info(page: Mapping[str, float]) -> dict[str, str]:
    """Returns what the denoiser has made of its settings: its device, dtype and more; nothing if the page lacks it."""
    lines = (dict(_LABEL.findall(name)) for name in page if name.startswith(f"{STAGE_INFO}{{"))
    return next((labels for labels in lines if labels.get("model", "").endswith("denoiser")), {})

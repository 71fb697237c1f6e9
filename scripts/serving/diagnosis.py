"""What is wrong with a server that was ready, and what is full: decided from what was observed, touching nothing."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from audioldm2_triton.server import metric_names
from audioldm2_triton.server.stage_tensors import DECODER

_BROKEN: Final = f"{metric_names.ENGINE_BROKEN}{{"
_INSIDE: Final = f"{metric_names.STAGE_REQUESTS}{{"
_WORK_AND_WHAT_SHOWS_IT: Final = (
    (
        f"{metric_names.ROWS_IN_FLIGHT}{{",
        f"{metric_names.STEPS_TOTAL}{{",
        "the engine{{{} makes no step",
    ),
    # Triton's own: requests that wait for a model to take them, and how often it has taken some.
    (
        "nv_inference_pending_request_count{",
        "nv_inference_exec_count{",
        "the model{{{} takes no request",
    ),
    # The text stage and the decoder take requests at once; a thread works on them.
    (
        _INSIDE,
        f"{metric_names.STAGE_PROGRESS_TOTAL}{{",
        "the model{{{} makes no progress",
    ),
)
"""What a stalled stage has more than 0 of, what then does not change, and what that is called."""
_INSIDE_MODEL: Final = re.compile(rf'{metric_names.STAGE_REQUESTS}\{{model="([^"]*)"')


@dataclass(frozen=True)
class StageProcess:
    """A process of a stage that was there when the server became ready."""

    model: str
    alive: bool
    stopped: bool  # by a signal such as SIGSTOP


@dataclass(frozen=True)
class Observation:
    """A server at one moment."""

    time_s: float  # on the monotonic clock
    stages: tuple[StageProcess, ...]
    metrics: Mapping[str, float] | None  # None: the page did not answer


@dataclass(frozen=True)
class Patience:
    """For how many seconds a symptom may last before the server counts as failed."""

    answering_in_s: float = 3.0  # of a broken engine that refuses what it held, as long as requests are inside
    answered_in_s: float = 1.0  # the last answers may be on their way when nothing is inside any more
    stopped_in_s: float = 3.0
    silent_in_s: float = 60.0
    stalled_in_s: float = 600.0


Lasting = Mapping[str, float]
"""Since when each symptom has been there."""


def diagnose(
    observation: Observation, previous: Observation | None, lasting: Lasting, patience: Patience
) -> tuple[str | None, Lasting]:
    """Returns why the server has failed, or None, and the symptoms to pass on to the next call."""
    present = dict(_symptoms(observation, previous, patience))
    since = {symptom: lasting.get(symptom, observation.time_s) for symptom in present}
    for symptom, allowed in present.items():
        if observation.time_s - since[symptom] >= allowed:
            return symptom, since
    return None, since


def _symptoms(
    observation: Observation, previous: Observation | None, patience: Patience
) -> Iterator[tuple[str, float]]:
    """Yields each symptom, and for how long it may last."""
    for stage in observation.stages:
        if not stage.alive:
            yield f"the process of {stage.model} has died", 0.0
        elif stage.stopped:
            yield f"the process of {stage.model} is stopped", patience.stopped_in_s
    if observation.metrics is None:
        yield "the metrics page does not answer", patience.silent_in_s
        return
    broken: dict[str, list[bool]] = {}
    for name, value in observation.metrics.items():
        if name.startswith(_BROKEN):
            broken.setdefault(name.partition('model="')[2].partition('"')[0], []).append(value > 0)
    inside = observation.metrics.get(metric_names.STAGE_REQUESTS, 0) > 0
    allowed = patience.answering_in_s if inside else patience.answered_in_s
    yield from ((f"all engines of {model} are broken", allowed) for model, engines in broken.items() if all(engines))
    if previous is None or previous.metrics is None:
        return
    for name in observation.metrics:
        for work, done, symptom in _WORK_AND_WHAT_SHOWS_IT:
            shows = name.replace(work, done)
            if name.startswith(work) and shows in observation.metrics:
                pages = (previous.metrics, observation.metrics)
                if all(page.get(name, 0) > 0 for page in pages) and pages[0].get(shows) == pages[1][shows]:
                    yield symptom.format(name.removeprefix(work)), patience.stalled_in_s


MAX_INSIDE_DECODER: Final = 96
"""Requests in one of its processes before no more are let in: three times as many as it decodes together."""


def full_decoders(observation: Observation) -> set[str]:
    """Returns the decoders that fall behind. With several GPUs a decoder has as many processes."""
    metrics = observation.metrics or {}
    inside = {match[1]: value for name, value in metrics.items() if (match := _INSIDE_MODEL.match(name))}
    processes = Counter(stage.model for stage in observation.stages)
    return {
        name
        for name, value in inside.items()
        if name.endswith(DECODER) and value > MAX_INSIDE_DECODER * max(1, processes[name])
    }


@dataclass(frozen=True)
class RestartLimit:
    """The limit of restarts after which a supervisor gives up."""

    count: int = 5
    window_in_s: float = 600.0
    longest_delay_in_s: float = 30.0


def restart_delay(failures: tuple[float, ...], limit: RestartLimit) -> float | None:
    """Returns the seconds to wait before a restart, or None where the limit is reached.

    Args:
        failures: the times of all failures so far, the last one now, on the monotonic clock.
    """
    recent = sum(failures[-1] - failure < limit.window_in_s for failure in failures)
    if recent > limit.count:
        return None
    return 0.0 if recent == 1 else float(min(2 ** (recent - 2), limit.longest_delay_in_s))

"""What is wrong with a server that was ready, and what is full: decided from what was observed, touching nothing."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from audioldm2_triton.server import metric_names
from audioldm2_triton.server.stage_tensors import DECODER, TEXT_CONDITIONING

_BROKEN: Final = f"{metric_names.ENGINE_BROKEN}{{"
# Triton's own: requests that wait for a model to take them, and how often it has taken some.
_PENDING: Final = "nv_inference_pending_request_count{"
_EXECUTIONS: Final = "nv_inference_exec_count{"
# Our own: these stages take requests at once, and batch them themselves.
_INSIDE: Final = f"{metric_names.STAGE_REQUESTS}{{"
_INSIDE_MODEL: Final = re.compile(rf'{metric_names.STAGE_REQUESTS}\{{model="([^"]*)"')
_TAKEN: Final = f"{metric_names.STAGE_REQUESTS_TAKEN_TOTAL}{{"
_BATCHING: Final = tuple(f'{stage}"}}' for stage in (TEXT_CONDITIONING, DECODER))  # how the names of their series end
_IN_FLIGHT: Final = f"{metric_names.ROWS_IN_FLIGHT}{{"


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
    for name, rows in observation.metrics.items():
        if name.startswith(_IN_FLIGHT) and rows > 0 and previous.metrics.get(name, 0) > 0:
            steps = name.replace(_IN_FLIGHT, f"{metric_names.STEPS_TOTAL}{{")
            if observation.metrics.get(steps) == previous.metrics.get(steps):
                yield f"the engine{{{name.removeprefix(_IN_FLIGHT)} makes no step", patience.stalled_in_s
        if name.startswith(_PENDING) and rows > 0 and previous.metrics.get(name, 0) > 0:
            executions = name.replace(_PENDING, _EXECUTIONS)
            if observation.metrics.get(executions) == previous.metrics.get(executions):
                yield f"the model{{{name.removeprefix(_PENDING)} takes no request", patience.stalled_in_s
        if name.startswith(_INSIDE) and name.endswith(_BATCHING) and rows > 0 and previous.metrics.get(name, 0) > 0:
            taken = name.replace(_INSIDE, _TAKEN)
            if observation.metrics.get(taken, 0) - rows == previous.metrics.get(taken, 0) - previous.metrics[name]:
                yield f"the model{{{name.removeprefix(_INSIDE)} answers no request", patience.stalled_in_s


MAX_INSIDE_DECODER: Final = 96
"""Requests before no more are let in: three times as many as it decodes together."""


def full_decoders(metrics: Mapping[str, float]) -> set[str]:
    """Returns the decoders that fall behind."""
    inside = {match[1]: value for name, value in metrics.items() if (match := _INSIDE_MODEL.match(name))}
    return {name for name, value in inside.items() if name.endswith(DECODER) and value > MAX_INSIDE_DECODER}


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

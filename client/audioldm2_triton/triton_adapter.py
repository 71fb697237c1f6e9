"""What the models' `model.py` share: Triton requests to NumPy and back, exceptions to Triton's error codes.

Imports `triton_python_backend_utils`, which exists only inside Triton's Python backend.
"""

import json
import locale
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from audioldm2_triton.errors import AudioLDM2Error, InternalError, UnavailableError
from audioldm2_triton.memory import peak_memory_bytes
from audioldm2_triton.settings import Settings, read_settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

STAGE_REQUESTS_METRIC = "audioldm2_stage_requests"
PEAK_MEMORY_METRIC = "audioldm2_peak_memory_bytes"

T = TypeVar("T")
R = TypeVar("R")


def model_settings(args: Mapping[str, str]) -> Settings:
    """The settings of a model from the `args` of its `initialize`; what it logs goes to the server's log from here on.

    Raises `SettingsError`.
    """
    # Triton's embedded interpreter starts in the locale C, whatever the environment says: files with anything but ASCII
    # could not be read, those of the compiler among them.
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    logging.basicConfig(level=logging.INFO, format=f"{args['model_name']}: %(message)s")
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return read_settings({name: value["string_value"] for name, value in parameters.items()})


def input_arrays(request: Any) -> dict[str, np.ndarray]:
    """The tensors of a request by name; BYTES arrive as object arrays of `bytes`."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def response(outputs: Mapping[str, np.ndarray]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])


def error_response(error: BaseException, stage: str) -> Any:
    """The response for a request that failed in `stage`; the neighbours in its batch are not concerned."""
    known = as_known_error(error, stage)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(known), getattr(pb_utils.TritonError, known.code)))


def as_known_error(error: BaseException, stage: str) -> AudioLDM2Error:
    """An error of the contract as it is; out of memory as unavailable; all else as internal, logged in full."""
    if isinstance(error, AudioLDM2Error):
        return error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return UnavailableError(f"{stage} is out of memory; try again later, or ask for less")
    logger.error("%s failed\n%s", stage, "".join(traceback.format_exception(error)))
    return InternalError(f"{stage} failed: {type(error).__name__}: {error}")


def deadline_ns(request: Any) -> int:
    """The absolute deadline of a request that has just arrived, on the monotonic clock in ns; 0 where it has none."""
    timeout = timeout_us(request)
    return time.monotonic_ns() + timeout * 1000 if timeout > 0 else 0


def timeout_us(request: Any) -> int:
    """What a request allows in microseconds; 0 where it sets nothing.

    From the endpoints `generate` and `generate_stream`, `timeout` arrives among the custom parameters.
    """
    own: int = request.timeout()
    given = json.loads(request.parameters() or "{}").get("timeout", 0)
    return own or (int(given) if isinstance(given, int | float) else 0)


@cache
def _requests_family() -> Any:
    return pb_utils.MetricFamily(
        name=STAGE_REQUESTS_METRIC, description="Requests that a stage works on", kind=pb_utils.MetricFamily.GAUGE
    )


class RequestsGauge:
    """Of the requests that a stage works on, by which a server is drained before it stops."""

    def __init__(self, model: str) -> None:
        self._metric = _requests_family().Metric(labels={"model": model})
        self._lock = threading.Lock()

    def add(self, requests: int) -> None:
        # Two threads in operations of one metric bring down the whole server (2.51.0): they share a buffer.
        with self._lock:
            self._metric.increment(requests)


requests_gauge = cache(RequestsGauge)


@cache
def _memory_family() -> Any:
    return pb_utils.MetricFamily(
        name=PEAK_MEMORY_METRIC,
        description="Most memory that a stage has held: on its GPU, or the resident set of its process",
        kind=pb_utils.MetricFamily.GAUGE,
    )


class MemoryGauge:
    """Of the most memory that a stage has held on one device since it was started."""

    def __init__(self, stage: str, device: "torch.device") -> None:
        self._device = device
        self._metric = _memory_family().Metric(labels={"model": stage, "device": str(device)})
        self._lock = threading.Lock()
        self.update()

    def update(self) -> None:
        with self._lock:  # as `RequestsGauge`
            self._metric.set(peak_memory_bytes(self._device))


def respond_together(
    requests: Sequence[Any],
    parse: Callable[[Any], T],
    compute: Callable[[list[T]], list[dict[str, np.ndarray]]],
    stage: str,
) -> list[Any]:
    """One response per request, in order, with those that parse computed in one call.

    A request that does not parse fails alone. Where the common call fails, each is computed alone, so that only the
    one that cannot be computed fails.
    """
    gauge = requests_gauge(stage)
    gauge.add(len(requests))
    try:
        parsed = [_caught(parse, request) for request in requests]
        good = [item for item in parsed if not isinstance(item, Exception)]
        computed = iter(_compute_isolated(compute, good))
        results = [item if isinstance(item, Exception) else next(computed) for item in parsed]
    finally:
        gauge.add(-len(requests))
    return [error_response(item, stage) if isinstance(item, Exception) else response(item) for item in results]


def _compute_isolated(
    compute: Callable[[list[T]], list[dict[str, np.ndarray]]], items: list[T]
) -> list[dict[str, np.ndarray] | Exception]:
    results = _caught(compute, items) if items else []
    if not isinstance(results, Exception):
        return list(results)
    if len(items) == 1:
        return [results]
    logger.warning("a batch of %d requests failed (%s); computing each alone", len(items), results)
    return [result for item in items for result in _compute_isolated(compute, [item])]


def _caught(function: Callable[[T], R], argument: T) -> R | Exception:
    try:
        return function(argument)
    except Exception as error:
        return error

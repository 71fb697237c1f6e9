"""The common part of the models' `model.py`, whose adapters take, parse, compute and settle requests.

Imports `triton_python_backend_utils`, which exists only inside Triton's Python backend.
"""

import json
import locale
import logging
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from audioldm2_triton.errors import (
    DEADLINE_EXCEEDED,
    OUT_OF_MEMORY,
    AudioLDM2Error,
    DeadlineExceededError,
    InternalError,
    RequestCancelledError,
    UnavailableError,
    stream_message,
)
from audioldm2_triton.server import triton_metrics as metrics
from audioldm2_triton.server.entrance import Entrance
from audioldm2_triton.server.journal import TENSOR as JOURNAL
from audioldm2_triton.server.memory import is_out_of_memory, release_memory
from audioldm2_triton.server.read_request import ReadRequest, asks_for_codes, read_request
from audioldm2_triton.server.request_log import direct_log, log_outcome
from audioldm2_triton.server.request_record import RequestRecord, outcome_name, read_traceparent
from audioldm2_triton.server.settings import Settings, read_setting, read_settings
from audioldm2_triton.server.settlement import AnsweredError, Settlement, Settlements
from audioldm2_triton.server.spans import close_spans, trace_request

logger = logging.getLogger(__name__)

Outputs: TypeAlias = Mapping[str, np.ndarray]
"""The tensors of a response by name."""

T = TypeVar("T")
R = TypeVar("R")


def model_settings(args: Mapping[str, str]) -> Settings:
    """Reads the settings of a model from the `args` of its `initialize`, and directs its log to the server's.

    Raises `SettingsError`.
    """
    prepare_process(args)
    return read_settings(model_parameters(args))


def prepare_process(args: Mapping[str, str]) -> None:
    """Sets the locale and the log of a model's process. Raises `SettingsError`."""
    # Triton's embedded interpreter starts in the locale C, whatever the environment says: files with non-ASCII text,
    # such as the compiler's, could not be read.
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    direct_log(args["model_name"], read_setting("log_format", model_parameters(args)))


def model_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The `parameters` of a model's `config.pbtxt`."""
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return {name: value["string_value"] for name, value in parameters.items()}


def unchanged(outputs: Outputs) -> Outputs:
    return outputs


def response(outputs: Outputs, requested: Collection[str]) -> Any:
    """Makes a response of those outputs that are requested; of all if none is named."""
    # Triton 2.51.0 would drop the others itself, but frees their arrays without holding the interpreter's lock: a race
    # in Python 3.11, a crash of the process in 3.12.
    chosen = {name: array for name, array in outputs.items() if name in requested or not requested}
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in chosen.items()])


def error_response(error: BaseException, stage: str, say: Callable[[AudioLDM2Error], str] = str) -> Any:
    """Makes the response for a request that failed in `stage`; its neighbours in the batch are not affected."""
    known = as_known_error(error, stage)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(say(known), getattr(pb_utils.TritonError, known.code)))


def as_known_error(error: BaseException, stage: str) -> AudioLDM2Error:
    """Maps out of memory to unavailable, and any error outside the contract to internal, which is logged in full.

    Counts each by its reason.
    """
    reason = outcome_name(error)
    metrics.count_failure(stage, reason)
    if isinstance(error, AudioLDM2Error):
        return error
    if reason == OUT_OF_MEMORY:
        logger.warning("%s is out of memory: %s", stage, error)
        return UnavailableError(f"{stage} is out of memory; try again later, or ask for less")
    logger.error("%s failed\n%s", stage, "".join(traceback.format_exception(error)))
    return InternalError(f"{stage} failed: {type(error).__name__}: {error}")


def open_settlements(model: str) -> Settlements:
    """Opens the settlements of a model, which are counted by the gauge of its requests."""
    metrics.show_histograms(model)
    return Settlements(model, metrics.requests_gauge(model).add)


def close_settlements(settlements: Settlements) -> None:
    """Answers every open request, and reports the last metrics."""
    settlements.close()
    metrics.close_metrics()
    close_spans()


@dataclass(frozen=True)
class TakenRequest(Generic[T]):
    """A request that a model has to answer."""

    read: ReadRequest
    settlement: Settlement[T]
    record: RequestRecord
    _sender: Any
    _requested: Collection[str]  # names of outputs

    def is_cancelled(self) -> bool:
        """Returns whether nobody waits for the answer: the client has gone, or has been answered."""
        # Triton 2.51.0 dies of SIGSEGV when asked about a request that has its final response.
        try:
            return bool(self.settlement.while_open(self._sender.is_cancelled))
        except AnsweredError:
            return True

    def send_part(self, outputs: Outputs) -> None:
        """Sends a response before the final one. Raises `AnsweredError` if the final one has been sent."""
        part = response(outputs, self._requested)
        self.settlement.while_open(lambda: self._sender.send(part))


def take(
    requests: Sequence[Any],
    outputs: Callable[[T], Outputs],
    settlements: Settlements,
    default_timeout_in_s: float,
    in_stream: bool = False,
    entrance: Entrance | None = None,
) -> list[TakenRequest[T]]:
    """Takes all requests that have just arrived, before any work on the first of them.

    A request that cannot even be read is answered at once.

    Args:
        outputs: makes the tensors of the final response.
        in_stream: whether errors have their codes in their messages, as those of a stream, whoever asks.
        entrance: of a model that is the first that a request reaches, which refuses it while the entrance is closed.
    """
    taken = []
    for request in requests:
        sender = request.get_response_sender()
        requested = frozenset(request.requested_output_names())
        is_part = asks_for_codes(request)  # of a stream
        say = stream_message if in_stream or is_part else str
        record = RequestRecord(settlements.stage, request.request_id(), is_part=is_part)
        prepare = partial(_final_response, outputs, requested, settlements.stage, say)
        settlement: Settlement[T] = settlements.take(prepare, partial(_send_final, sender), partial(_ended, record))
        try:
            if entrance is not None:
                entrance.check_open()
            read = read_request(request, default_timeout_in_s, record.arrived_ns)
            settlement.expect_by(read.deadline_ns)
            record.control = read.control
            record.traceparent = read_traceparent(read.parameters, request.trace().get_context())
            record.read(read.inputs.get(JOURNAL))
            taken.append(TakenRequest(read, settlement, record, sender, requested))
        except BaseException as error:
            settlement.settle(error)
    metrics.count_taken(settlements.stage, len(requests) - sum(not each.record.is_watched for each in taken))
    return taken


def _final_response(
    outputs: Callable[[T], Outputs],
    requested: Collection[str],
    stage: str,
    say: Callable[[AudioLDM2Error], str],
    outcome: T | BaseException,
) -> Any:
    if isinstance(outcome, BaseException):
        return error_response(outcome, stage, say)
    return response(outputs(outcome), requested)


def _ended(record: RequestRecord, outcome: object) -> None:
    now = time.monotonic_ns()
    log_outcome(record, outcome, now)
    metrics.measure_request(record, outcome, now)
    trace_request(record, outcome, now)


def _send_final(sender: Any, final: Any) -> None:
    # The response and the final flag in one call; otherwise the client may wait for ever.
    sender.send(final, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def rows_of(request: TakenRequest[T]) -> int:
    return request.read.rows


def answer_together(
    requests: Sequence[TakenRequest[Outputs]],
    parse: Callable[[ReadRequest], T],
    compute: Callable[[list[T]], list[dict[str, np.ndarray]]],
) -> None:
    """Answers each request; those that parse are computed together in one call.

    A request that does not parse, that nobody waits for, or whose deadline has passed, fails alone. If the common call
    fails, it is repeated in halves, so that only the faulty one fails, and what lacked memory gets by with less. Raises
    nothing.
    """
    try:
        items: list[T] = []
        parsed: list[Settlement[Outputs]] = []
        for request in requests:
            item = _caught(partial(_parse_in_time, parse), request)
            if isinstance(item, BaseException):
                request.settlement.settle(item)
            else:
                items.append(item)
                parsed.append(request.settlement)
        for settlement, result in zip(parsed, _compute_isolated(compute, items), strict=True):
            settlement.settle(result)
    except BaseException as error:
        for request in requests:
            if not request.settlement.settled:
                request.settlement.settle(error)


def _parse_in_time(parse: Callable[[ReadRequest], T], request: TakenRequest[Outputs]) -> T:
    if 0 < request.read.deadline_ns <= time.monotonic_ns():
        raise DeadlineExceededError(f"{DEADLINE_EXCEEDED} while it waited")
    if request.is_cancelled():
        raise RequestCancelledError("cancelled by the client")
    return parse(request.read)


def _compute_isolated(
    compute: Callable[[list[T]], list[dict[str, np.ndarray]]], items: list[T]
) -> list[dict[str, np.ndarray] | BaseException]:
    results = _caught(compute, items) if items else []
    if not isinstance(results, BaseException):
        return list(results)
    if is_out_of_memory(results):
        release_memory(results)
    if len(items) == 1:
        return [results]
    logger.warning("a batch of %d requests failed (%s); computing its halves", len(items), results)
    half = len(items) // 2
    return [result for part in (items[:half], items[half:]) for result in _compute_isolated(compute, part)]


def _caught(function: Callable[[T], R], argument: T) -> R | BaseException:
    try:
        return function(argument)
    except BaseException as error:
        return error

"""Runs the denoiser's part of a stream: passes its progress to the client, and a cancellation to it."""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

import numpy as np

from audioldm2_triton.errors import AudioLDM2Error, as_exception
from audioldm2_triton.server import faults
from audioldm2_triton.server.stage_tensors import AFTER, CANCEL, CONTROL, DENOISED, DENOISER, JOB, PROGRESS
from stage_calls import CallStage, Interruption, Send, StageCall, Tensors

INTERRUPTION_POLL_IN_S: Final = 0.03
UNKNOWN_JOB_RETRY_IN_S: Final = 0.01

_Outcome: TypeAlias = Tensors | Exception

logger = logging.getLogger(__name__)


def denoise(call: CallStage, conditioning: Tensors, send: Send, interruption: Interruption) -> np.ndarray:
    """Returns the latents [1, N, C, H, W] of one request; sends each of its steps once, in order and without gaps.

    Args:
        conditioning: the outputs of the text stage.

    Raises the denoiser's error, or the interruption as soon as the denoiser has dropped the request.
    """
    job = uuid.uuid4().hex
    outcomes: SimpleQueue[_Outcome | tuple[int, int]] = SimpleQueue()
    over = threading.Event()
    sent = 0
    reason: AudioLDM2Error | None = None
    next_poll = time.monotonic()
    answered = False
    try:
        # If either thread cannot be started, the denoiser has no request yet.
        _start(_watch, job, call, job, outcomes, over)
        _start(_denoise, job, call, conditioning, job, outcomes)
        while True:
            outcome = _next(outcomes, max(0.0, next_poll - time.monotonic()))
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + INTERRUPTION_POLL_IN_S
                reason = reason or interruption()
                if reason is not None:
                    # Repeatedly, because the denoiser may not know the job yet.
                    _let_go(call, job)
            if isinstance(outcome, tuple):
                step, num_steps = outcome
                if reason is None:
                    sent = _send_steps(send, sent, step, num_steps)
            elif outcome is not None:
                answered = True
                if reason is not None:
                    raise reason
                if isinstance(outcome, Exception):
                    raise outcome
                # The rest, of a job that was done before it could be asked.
                num_steps = int(outcome["num_steps"][0, 0])
                _send_steps(send, sent, num_steps, num_steps)
                return outcome["latents"]
    finally:
        over.set()
        if not answered:
            _let_go(call, job)


def _start(target: Callable[..., None], job: str, *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, name=f"{target.__name__}-{job}", daemon=True).start()


def _let_go(call: CallStage, job: str) -> None:
    """Cancels a job whose result nobody is waiting for."""
    try:
        _control(call, CANCEL, job)
    except Exception:
        logger.exception("a request could not be cancelled in the denoiser")


def _next(
    outcomes: "SimpleQueue[_Outcome | tuple[int, int]]", timeout_in_s: float
) -> _Outcome | tuple[int, int] | None:
    try:
        return outcomes.get(timeout=timeout_in_s)
    except Empty:
        return None


def _send_steps(send: Send, sent: int, step: int, num_steps: int) -> int:
    """Sends all steps after the last sent up to `step`, since several may pass between polls. Returns the last sent."""
    for index in range(sent + 1, step + 1):
        send({"step": np.array([[index]], np.int32), "num_steps": np.array([[num_steps]], np.int32)})
    return max(sent, step)


def _denoise(
    call: CallStage, conditioning: Tensors, job: str, outcomes: "SimpleQueue[_Outcome | tuple[int, int]]"
) -> None:
    try:
        faults.at("audioldm2_stream.denoise")
        inputs = {name: conditioning[name] for name in DENOISED}
        outcomes.put(call(StageCall(DENOISER, inputs, ["latents", "num_steps", "journal"], {JOB: job})))
    except BaseException as error:
        outcomes.put(as_exception(error))


def _watch(
    call: CallStage, job: str, outcomes: "SimpleQueue[_Outcome | tuple[int, int]]", over: threading.Event
) -> None:
    """Asks for progress repeatedly; the denoiser answers each time when there is some."""
    seen = 0
    try:
        faults.at("audioldm2_stream.watch")
        while not over.is_set():
            step, num_steps = _control(call, PROGRESS, job, seen)
            if step > seen:
                seen = step
                outcomes.put((step, num_steps))
            else:
                over.wait(UNKNOWN_JOB_RETRY_IN_S)  # the job is still unknown, or already gone
    except BaseException:
        # Progress is optional: the request goes on without it, and its own call reports what is wrong.
        logger.exception("the progress of a request cannot be reported")


def _control(call: CallStage, control: str, job: str, after: int = 0) -> tuple[int, int]:
    # Triton needs at least one input.
    inputs = {"deadline_ns": np.zeros((1, 1), np.int64)}
    answer = call(StageCall(DENOISER, inputs, ["step", "num_steps"], {CONTROL: control, JOB: job, AFTER: after}))
    return int(answer["step"][0, 0]), int(answer["num_steps"][0, 0])

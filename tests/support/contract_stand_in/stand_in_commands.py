"""What the stand-in's two models share: the commands in prompts, and what is answered.

A prompt that begins with "!" is a command:
`!fail CODE MESSAGE`; `!raise MESSAGE`, out of `execute()`; `!busy KEY TIMES MESSAGE`, unavailable so many times;
`!meet N`, answered once N requests are in flight;
`!sleep SECONDS`, which minds the request's deadline and its cancellation, and `!deaf SECONDS`, which minds neither;
`!watch PATH`, which for `WATCHED_IN_S` waits to be cancelled and writes the file "cancelled" or "not cancelled".
For the stream alone: `!late CODE MESSAGE`, which fails after the progress, and `!torn`, which lacks the last response.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from stand_in_audio import NATIVE_AUDIO_LENGTH_IN_S, SAMPLING_RATE, stand_in_audio, stand_in_scores

MEETING_TIMEOUT_IN_S = 60.0
WATCHED_IN_S = 20.0
TICK_IN_S = 0.02

MEETINGS: dict[int, threading.Barrier] = {}
REFUSED: Counter[str] = Counter()


class CommandedError(Exception):
    """Failure with the Triton error code in `args[0]` and the message in `args[1]`."""


def inputs_of(request: Any) -> dict[str, np.ndarray]:
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def command_of(inputs: dict[str, np.ndarray]) -> tuple[str, str]:
    """The first row's command and what follows it."""
    verb, _, rest = inputs["prompt"][0, 0].decode().partition(" ")
    return verb, rest


def obey(inputs: dict[str, np.ndarray], timeout_us: int, is_cancelled: Callable[[], bool]) -> None:
    """Does what the command says. Raises `CommandedError`."""
    verb, rest = command_of(inputs)
    if verb == "!fail":
        raise CommandedError(*rest.split(" ", 1))
    if verb == "!busy":
        key, times, message = rest.split(" ", 2)
        REFUSED[key] += 1
        if REFUSED[key] <= int(times):
            raise CommandedError("UNAVAILABLE", message)
    if verb == "!meet":
        MEETINGS.setdefault(int(rest), threading.Barrier(int(rest))).wait(MEETING_TIMEOUT_IN_S)
    if verb == "!deaf":
        time.sleep(float(rest))
    if verb == "!sleep":
        _sleep(float(rest), timeout_us, is_cancelled)
    if verb == "!watch":
        Path(f"{rest}.begun").touch()
        try:
            _sleep(WATCHED_IN_S, timeout_us, is_cancelled)
            Path(rest).write_text("not cancelled")
        except CommandedError:
            Path(rest).write_text("cancelled")
            raise


def _sleep(seconds: float, timeout_us: int, is_cancelled: Callable[[], bool]) -> None:
    start = time.monotonic()
    while (now := time.monotonic()) < start + seconds:
        if is_cancelled():
            raise CommandedError("CANCELLED", "cancelled by the client")
        if timeout_us and now >= start + timeout_us / 1e6:
            raise CommandedError("CANCELLED", f"deadline exceeded: {timeout_us} us")
        time.sleep(TICK_IN_S)


def outputs_for(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows = [
        {
            name: tensor[row, 0].decode() if tensor.dtype == object else tensor[row, 0].item()
            for name, tensor in inputs.items()
        }
        for row in range(len(inputs["prompt"]))
    ]
    audio, score = [], []
    for row in rows:
        # FP32 travels as the nearest binary number; the contract means the shortest decimal.
        length = float(str(np.float32(row.pop("audio_length_in_s", NATIVE_AUDIO_LENGTH_IN_S))))
        for name in ("guidance_scale", "window_length_in_s"):
            row[name] = float(str(np.float32(row[name])))
        waveforms = row["num_waveforms_per_prompt"]
        audio.append(stand_in_audio(row, waveforms, length))
        score.append(stand_in_scores(waveforms) * row["return_scores"])
    return {
        "audio": np.stack(audio),
        "score": np.stack(score),
        "sampling_rate": np.full((len(rows), 1), SAMPLING_RATE, np.int32),
        "seed_used": inputs["seed"],
        "encoded_audio": np.full((len(rows), len(score[0])), b"", np.object_),
    }


def response(tensors: dict[str, np.ndarray]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])


def error_response(error: Exception, in_stream: bool = False) -> Any:
    code, message = error.args if isinstance(error, CommandedError) else ("INTERNAL", repr(error))
    if in_stream:
        message = f"{code}: {message}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))

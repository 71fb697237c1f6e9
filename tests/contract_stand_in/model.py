"""A model with the tensors of the contract and no AudioLDM 2 in it, for tests of the client against a real Triton.

A prompt that begins with "!" is a command: `!fail CODE MESSAGE`, `!raise MESSAGE`, `!meet N` (answered once N requests
are in flight), `!sleep SECONDS` (minds the request's deadline) and `!deaf SECONDS` (does not).
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from stand_in_audio import NATIVE_AUDIO_LENGTH_IN_S, SAMPLING_RATE, stand_in_audio, stand_in_scores

MEETING_TIMEOUT_IN_S = 10.0


class CommandedError(Exception):
    """Failure with the Triton error code in `args[0]` and the message in `args[1]`."""


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002
        self.meetings: dict[int, threading.Barrier] = {}

    def execute(self, requests: Sequence[Any]) -> None:
        if any(_texts(request, "prompt")[0].startswith("!raise") for request in requests):
            raise ValueError("an exception out of execute()")
        for request in requests:
            # The request itself is gone when execute() has returned.
            answer = partial(self._answer, _inputs(request), request.timeout(), _texts(request, "prompt")[0])
            threading.Thread(target=_send, args=(request.get_response_sender(), answer), daemon=True).start()

    def _answer(self, inputs: dict[str, np.ndarray], timeout_us: int, command: str) -> dict[str, np.ndarray]:
        verb, _, rest = command.partition(" ")
        if verb == "!fail":
            raise CommandedError(*rest.split(" ", 1))
        if verb == "!meet":
            self.meetings.setdefault(int(rest), threading.Barrier(int(rest))).wait(MEETING_TIMEOUT_IN_S)
        if verb == "!sleep":
            time.sleep(min(float(rest), timeout_us / 1e6 if timeout_us else float("inf")))
            if timeout_us and timeout_us / 1e6 < float(rest):
                raise CommandedError("CANCELLED", f"deadline exceeded: {timeout_us} us")
        if verb == "!deaf":
            time.sleep(float(rest))
        return _outputs(inputs)


def _inputs(request: Any) -> dict[str, np.ndarray]:
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def _texts(request: Any, name: str) -> list[str]:
    return [item[0].decode() for item in _inputs(request)[name]]


def _outputs(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
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
        row["guidance_scale"] = float(str(np.float32(row["guidance_scale"])))
        waveforms = row["num_waveforms_per_prompt"]
        audio.append(stand_in_audio(row, waveforms, length))
        score.append(stand_in_scores(waveforms) * row["return_scores"])
    return {
        "audio": np.stack(audio),
        "score": np.stack(score),
        "sampling_rate": np.full((len(rows), 1), SAMPLING_RATE, np.int32),
        "seed_used": inputs["seed"],
    }


def _send(sender: Any, answer: Callable[[], dict[str, np.ndarray]]) -> None:
    try:
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer().items()])
    except CommandedError as error:
        code, message = error.args
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))
    except Exception as error:
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(repr(error)))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

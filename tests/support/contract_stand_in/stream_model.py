"""The stand-in for `audioldm2_stream`: what `model.py` answers, with progress before and in chunks."""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from stand_in_commands import (
    CommandedError,
    command_of,
    error_response,
    inputs_of,
    obey,
    outputs_for,
    response,
)

NUM_CHUNKS = 3


class TritonPythonModel:
    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            inputs = inputs_of(request)
            if command_of(inputs)[0] == "!raise":
                raise ValueError("an exception out of execute()")
            # `generate_stream` makes a plain parameter of what is Triton's own in all other ways to call a model.
            timeout_us = request.timeout() or int(json.loads(request.parameters()).get("timeout", 0))
            arguments = (request.get_response_sender(), inputs, timeout_us)
            threading.Thread(target=_answer, args=arguments, daemon=True).start()


def _answer(sender: Any, inputs: dict[str, np.ndarray], timeout_us: int) -> None:
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    try:
        *others, last = _responses(inputs)
        verb, rest = command_of(inputs)
        for index, tensors in enumerate(others):
            sender.send(response(tensors))
            if index == 0:
                obey(inputs, timeout_us, sender.is_cancelled)
        if verb == "!late":
            raise CommandedError(*rest.split(" ", 1))
        if verb == "!torn":
            sender.send(flags=final)
        else:
            sender.send(response(last), flags=final)
    except Exception as error:
        sender.send(error_response(error, in_stream=True), flags=final)


def _responses(inputs: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    outputs = outputs_for(inputs)
    num_steps = int(inputs["num_inference_steps"][0, 0])
    for step in range(1, num_steps + 1):
        yield {"step": _integer(step), "num_steps": _integer(num_steps)}
    # Waveforms in generation order, here the worst first.
    for chunk, audio in enumerate(np.array_split(outputs["audio"][:, ::-1], NUM_CHUNKS, axis=2)):
        counts = {"chunk": _integer(chunk), "num_chunks": _integer(NUM_CHUNKS)}
        yield {"audio": np.ascontiguousarray(audio), "sampling_rate": outputs["sampling_rate"], **counts}
    order = np.arange(outputs["score"].shape[1], dtype=np.int32)[None, ::-1]
    last = {name: outputs[name] for name in ("score", "seed_used", "sampling_rate")}
    yield {**last, "order": np.ascontiguousarray(order)}


def _integer(value: int) -> np.ndarray:
    return np.array([[value]], np.int32)

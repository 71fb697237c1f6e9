"""Triton's HTTP endpoint `generate_stream`: a request as JSON, and its server-sent events as tensors."""

import json
import math
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from tritonclient.utils import InferenceServerException

from audioldm2_triton import contract
from audioldm2_triton.errors import InternalError, invalid
from audioldm2_triton.transport.stream_reader import Tensors
from audioldm2_triton.transport.wire import InferRequest

HEADERS: Final = {"Content-Type": "application/json", "Accept": "text/event-stream"}

_DATA: Final = b"data:"


def path(model: str) -> str:
    """Returns the endpoint of the streaming model beside the ensemble `model`."""
    return f"/v2/models/{quote(contract.stream_of(model), safe='')}/generate_stream"


def request_body(request: InferRequest) -> bytes:
    """Makes the body for one prompt. Raises `InvalidArgumentError` for numbers that JSON lacks."""
    body: dict[str, Any] = {}
    for name, tensor in request.tensors.items():
        value = tensor[0, 0]
        body[name] = value.decode() if isinstance(value, bytes) else value.item()
        if isinstance(body[name], float) and not math.isfinite(body[name]):
            raise invalid(name, body[name], "a finite number")
    if request.timeout_us is not None:
        body["timeout"] = request.timeout_us
    if request.request_id:
        body["id"] = request.request_id
    return json.dumps(body).encode()


class EventStream:
    """Assembles events from the body, in whatever pieces it arrives."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a line whose end is still to come

    def feed(self, piece: bytes) -> Iterator[Tensors]:
        """Yields the outputs of each response that this piece completes: scalars if they have one element, else flat.

        Raises `InferenceServerException` for an error response.
        """
        *lines, rest = piece.split(b"\n")
        for line in lines:
            self._pieces.append(line)
            whole = b"".join(self._pieces).strip()
            self._pieces.clear()
            if whole.startswith(_DATA):
                yield _tensors(whole)
        self._pieces.append(rest)


def refusal(status: int, body: bytes) -> InferenceServerException:
    """Makes the error of an HTTP status other than 200, with the message in its body."""
    text = body.strip().removeprefix(_DATA)
    try:
        message = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return InferenceServerException(text.decode(errors="replace"), str(status), "no JSON of Triton's")
    return _error(message, status)


def _tensors(line: bytes) -> Tensors:
    try:
        response = json.loads(line.removeprefix(_DATA))
    except ValueError as error:
        raise InternalError(f"the server's stream has an event that is not JSON: {error}") from error
    if "error" in response:
        raise _error(response["error"])
    return {name: np.asarray(value) for name, value in response.items()}


def _error(message: str, status: int = 400) -> InferenceServerException:
    # Triton answers 400 here for every error of a model, so only the message distinguishes them.
    return InferenceServerException(message, None if status == 400 else str(status))

"""Reads the requests of Triton's Python backend. Knows them by their methods alone, and imports no Triton."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from audioldm2_triton.contract import BATCH, INTERACTIVE
from audioldm2_triton.server.deadlines import deadline_ns
from audioldm2_triton.server.stage_tensors import CODED, CONTROL


@dataclass(frozen=True)
class ReadRequest:
    """The contents of a request, independent of Triton's buffers."""

    inputs: dict[str, np.ndarray]
    parameters: Mapping[str, Any]
    timeout_us: int  # 0: none
    arrived_ns: int  # on the monotonic clock
    deadline_ns: int  # on the same; 0: none

    @property
    def control(self) -> str:
        """The kind of a request between the models of one server; empty for an ordinary request."""
        return str(self.parameters.get(CONTROL, ""))

    @property
    def rows(self) -> int:
        """The prompts of the request."""
        return max((len(array) for array in self.inputs.values()), default=1)

    @property
    def priority(self) -> str:
        """The priority as far as it can be read; the stage validates it with all other inputs."""
        given = self.inputs.get("priority")
        asks_for_batch = given is not None and given.size and given.flat[0] == BATCH.encode()
        return BATCH if asks_for_batch else INTERACTIVE


def read_request(request: Any, default_timeout_in_s: float, arrived_ns: int) -> ReadRequest:
    """Reads a request that has just arrived.

    Its deadline is the input `deadline_ns`, if an earlier stage has set it; otherwise it follows from the request's own
    `timeout`; otherwise from the default timeout, unless that is 0.
    """
    inputs = input_arrays(request)
    parameters = json.loads(request.parameters() or "{}")
    timeout_us = _timeout_us(request, parameters)
    set_before = inputs.get("deadline_ns")
    deadline = 0 if set_before is None or not set_before.size else int(set_before.flat[0])
    deadline = deadline or deadline_ns(timeout_us, default_timeout_in_s)
    return ReadRequest(inputs, parameters, timeout_us, arrived_ns, deadline)


def input_arrays(request: Any) -> dict[str, np.ndarray]:
    """The tensors of a request by name; BYTES arrive as object arrays of `bytes`."""
    # Copies, because Triton's buffers are gone once execute() has returned or the request is answered.
    return {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}


def _timeout_us(request: Any, parameters: Mapping[str, Any]) -> int:
    """Returns the request's own timeout in microseconds; 0 if it sets none.

    From the endpoints `generate` and `generate_stream`, `timeout` arrives among the custom parameters.
    """
    own: int = request.timeout()
    given = parameters.get("timeout", 0)
    return own or (int(given) if isinstance(given, int | float) else 0)


def asks_for_codes(request: Any) -> bool:
    """Whether it is a call of `audioldm2_stream`'s."""
    try:
        return CODED in json.loads(request.parameters() or "{}")
    except Exception:  # whatever is wrong with them is found again where it can be answered
        return False

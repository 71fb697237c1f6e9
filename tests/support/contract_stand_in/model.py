"""A model with the tensors of the contract and no AudioLDM 2 in it, for tests of the client against a real Triton."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from stand_in_commands import command_of, error_response, inputs_of, obey, outputs_for, response


class TritonPythonModel:
    def execute(self, requests: Sequence[Any]) -> None:
        if any(command_of(inputs_of(request))[0] == "!raise" for request in requests):
            raise ValueError("an exception out of execute()")
        for request in requests:
            # The request itself is gone when execute() has returned.
            arguments = (request.get_response_sender(), inputs_of(request), request.timeout())
            threading.Thread(target=_answer, args=arguments, daemon=True).start()


def _answer(sender: Any, inputs: dict[str, np.ndarray], timeout_us: int) -> None:
    try:
        obey(inputs, timeout_us, sender.is_cancelled)
        answer = response(outputs_for(inputs))
    except Exception as error:
        answer = error_response(error)
    sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

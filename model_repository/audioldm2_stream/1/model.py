"""Triton adapter of the stream: a thread for each request, calls to the stages, errors to codes."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from audioldm2_triton import triton_adapter as adapter
from audioldm2_triton.errors import (
    AudioLDM2Error,
    InternalError,
    InvalidArgumentError,
    RequestCancelledError,
    UnavailableError,
)
from generation_stream import StreamRequest, stream_generation
from running_streams import RunningStreams
from stage_calls import StageCall, Tensors

STAGE = "audioldm2_stream"
KINDS = (InvalidArgumentError, UnavailableError, RequestCancelledError)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.stage_prefix = json.loads(args["model_config"])["parameters"]["stage_prefix"]["string_value"]
        self.streams = RunningStreams()
        self.gauge = adapter.requests_gauge(args["model_name"])

    def execute(self, requests: Sequence[Any]) -> None:
        # Never blocks: a thread answers.
        for request in requests:
            # Copies: Triton's buffers are gone once execute() has returned.
            inputs = {name: array.copy() for name, array in adapter.input_arrays(request).items()}
            parsed = StreamRequest(inputs, adapter.timeout_us(request))
            self.gauge.add(1)
            call = partial(_call_stage, self.stage_prefix, request.request_id())
            self.streams.start(partial(self._serve, parsed, request.get_response_sender(), call))

    def finalize(self) -> None:
        self.streams.close()

    def _serve(self, request: StreamRequest, sender: Any, call: Any) -> None:
        def send(tensors: Tensors) -> None:
            sender.send(adapter.response(tensors))

        try:
            last = adapter.response(stream_generation(request, call, send, partial(self._interruption, sender)))
        except Exception as error:
            last = adapter.error_response(error, STAGE)
        # The response and the final flag in one call, else the client may wait for ever.
        sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.gauge.add(-1)

    def _interruption(self, sender: Any) -> AudioLDM2Error | None:
        if sender.is_cancelled():
            return RequestCancelledError("cancelled by the client")
        if self.streams.closing:
            return UnavailableError(f"{STAGE} is shutting down; try again")
        return None


def _call_stage(prefix: str, request_id: str, call: StageCall) -> Tensors:
    response = pb_utils.InferenceRequest(
        request_id=request_id,
        model_name=prefix + call.model,
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in call.inputs.items()],
        requested_output_names=list(call.outputs),
        parameters=dict(call.parameters),
        timeout=call.timeout_us,
    ).exec()
    if response.has_error():
        raise _stage_error(response.error())
    # Copies: the buffers go with the response.
    return {tensor.name(): tensor.as_numpy().copy() for tensor in response.output_tensors()}


def _stage_error(error: Any) -> AudioLDM2Error:
    """The error of a stage as the stage's own exception was."""
    kinds = {getattr(pb_utils.TritonError, kind.code): kind for kind in KINDS}
    return kinds.get(error.code(), InternalError)(error.message())

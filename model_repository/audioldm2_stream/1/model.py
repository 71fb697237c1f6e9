"""Triton adapter of the stream: a thread for each request, calls to the stages, errors to codes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from audioldm2_triton.contract import STREAM
from audioldm2_triton.errors import AudioLDM2Error, RequestCancelledError, UnavailableError, read_message
from audioldm2_triton.server import faults
from audioldm2_triton.server import triton_adapter as adapter
from audioldm2_triton.server.entrance import entrance_of
from audioldm2_triton.server.journal import TENSOR as JOURNAL
from audioldm2_triton.server.request_parameters import check_parameters
from audioldm2_triton.server.request_record import TRACEPARENT
from audioldm2_triton.server.settings import read_setting
from audioldm2_triton.server.stage_tensors import CODED
from generation_stream import StreamRequest, stream_generation
from running_streams import RunningStreams
from stage_calls import StageCall, Tensors


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        adapter.prepare_process(args)
        parameters = adapter.model_parameters(args)
        self.stage_prefix = parameters["stage_prefix"]
        self.default_timeout_in_s = read_setting("default_timeout_in_s", parameters)
        self.streams = RunningStreams()
        self.settlements = adapter.open_settlements(args["model_name"])
        self.entrance = entrance_of(args["model_name"], STREAM)

    def execute(self, requests: Sequence[Any]) -> None:
        # Never blocks: a thread answers.
        for taken in adapter.take(
            *(requests, adapter.unchanged, self.settlements, self.default_timeout_in_s),
            in_stream=True,
            entrance=self.entrance,
        ):
            try:
                faults.at("audioldm2_stream.parse")
                self.streams.start(partial(self._serve, taken))
            except BaseException as error:
                taken.settlement.settle(error)

    def finalize(self) -> None:
        try:
            self.streams.close()
        finally:
            adapter.close_settlements(self.settlements)

    def _serve(self, taken: adapter.TakenRequest[Tensors]) -> None:
        def send(tensors: Tensors) -> None:
            faults.at("audioldm2_stream.send")
            taken.send_part(tensors)
            taken.record.sent(tensors)

        def interruption() -> AudioLDM2Error | None:
            if taken.is_cancelled():
                return RequestCancelledError("cancelled by the client")
            if self.streams.closing:
                return UnavailableError(f"{self.settlements.stage} is shutting down; try again")
            return None

        request = StreamRequest(taken.read.inputs, taken.read.timeout_us)
        # The request's own parameter, because Triton forwards headers to the model that the client calls alone.
        traced = {TRACEPARENT: taken.record.traceparent} if taken.record.traceparent else {}

        def call(stage_call: StageCall) -> Tensors:
            tensors = _call_stage(self.stage_prefix, taken.record.request_id, stage_call, traced)
            if JOURNAL in tensors:
                taken.record.learn(tensors[JOURNAL])
            return tensors

        try:
            faults.at("audioldm2_stream.serve")
            check_parameters(taken.read.parameters)
            taken.settlement.settle(stream_generation(request, call, send, interruption))
        except BaseException as error:
            taken.settlement.settle(error)


def _call_stage(prefix: str, request_id: str, call: StageCall, traced: Mapping[str, str]) -> Tensors:
    response = pb_utils.InferenceRequest(
        request_id=request_id,
        model_name=prefix + call.model,
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in call.inputs.items()],
        requested_output_names=list(call.outputs),
        parameters={**call.parameters, **traced, CODED: 1},
        timeout=call.timeout_us,
    ).exec()
    if response.has_error():
        # Triton calls all errors internal here.
        raise read_message(response.error().message())
    # Copies, because the buffers are freed with the response.
    return {tensor.name(): tensor.as_numpy().copy() for tensor in response.output_tensors()}

"""Triton adapter of the denoiser: requests to the engines, their answers to responses, errors to codes."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from torch import Tensor

from audioldm2_triton import triton_adapter as adapter
from audioldm2_triton.errors import invalid
from denoiser import load_engines
from denoiser_metrics import DenoiserMetrics
from resolved_tensors import parse_denoising_request, read_tensor_shapes

STAGE = "denoiser"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = adapter.model_settings(args)
        self.shapes = read_tensor_shapes(Path(settings.checkpoint))
        self.metrics = DenoiserMetrics(self.shapes.geometry, args["model_name"])
        self.engines = load_engines(settings, self.shapes.geometry, self.metrics.observer)

    def execute(self, requests: Sequence[Any]) -> None:
        # Never blocks: each request is answered when it is done.
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except Exception as error:
                _answer(sender, error)

    def finalize(self) -> None:
        self.engines.close()

    def is_ready(self) -> bool:
        """Asked by Triton from 26.04 on."""
        return any(engine.broken is None for engine in self.engines.engines)

    def _take(self, request: Any, sender: Any) -> None:
        parameters = json.loads(request.parameters() or "{}")
        job, control = str(parameters.get("job", "")), parameters.get("ctl", "")
        if control == "progress":
            self.engines.listen(job, int(parameters["after"]), partial(_answer_progress, sender))
        elif control == "cancel":
            self.engines.cancel(job)
            _answer_progress(sender, 0, 0)
        elif control:
            raise invalid("ctl", control, "progress or cancel")
        else:
            parsed = parse_denoising_request(adapter.input_arrays(request), self.shapes)
            self.engines.submit(parsed, partial(_answer, sender), sender.is_cancelled, job)


def _answer(sender: Any, outcome: Tensor | Exception) -> None:
    if isinstance(outcome, Exception):
        _send(sender, adapter.error_response(outcome, STAGE))
    else:
        _send(sender, adapter.response({"latents": outcome.numpy()}))


def _answer_progress(sender: Any, step: int, num_steps: int) -> None:
    counts = {"step": np.array([[step]], np.int32), "num_steps": np.array([[num_steps]], np.int32)}
    _send(sender, adapter.response(counts))


def _send(sender: Any, answer: Any) -> None:
    # The response and the final flag in one call, else the client may wait for ever.
    sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

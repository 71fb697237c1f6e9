"""Triton adapter of the denoiser: requests to the engine, its latents to responses, errors to codes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from torch import Tensor

from audioldm2_triton import triton_adapter as adapter
from audioldm2_triton.geometry import read_audio_geometry
from audioldm2_triton.settings import resolve_device, resolve_dtype
from denoiser import (
    engine_limits,
    load_schedule_tables,
    load_unet,
    parse_denoising_request,
    unet_forward,
    warm_up,
)
from engine import Engine

STAGE = "denoiser"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = adapter.model_settings(args)
        device = resolve_device(settings)
        dtype = resolve_dtype(settings, device)
        checkpoint = Path(settings.checkpoint)
        self.geometry = read_audio_geometry(checkpoint)
        unet = load_unet(checkpoint, device, dtype)
        self.engine = Engine(
            unet_forward(unet),
            load_schedule_tables(checkpoint),
            engine_limits(settings, device),
            device,
            dtype,
        )
        warm_up(self.engine, unet.config.cross_attention_dim[0], self.geometry)

    def execute(self, requests: Sequence[Any]) -> None:
        # Never blocks: the engine answers each request when its last waveform is done.
        for request in requests:
            sender = request.get_response_sender()
            try:
                parsed = parse_denoising_request(adapter.input_arrays(request), self.geometry)
                self.engine.submit(parsed, partial(_answer, sender), sender.is_cancelled)
            except Exception as error:
                _answer(sender, error)

    def finalize(self) -> None:
        self.engine.close()


def _answer(sender: Any, outcome: Tensor | Exception) -> None:
    if isinstance(outcome, Exception):
        answer = adapter.error_response(outcome, STAGE)
    else:
        answer = adapter.response({"latents": outcome.numpy()})
    # The response and the final flag in one call, else the client may wait for ever.
    sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

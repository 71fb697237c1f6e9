"""Triton adapter of the decoder: tensors in, tensors out, errors to codes."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from audioldm2_triton import triton_adapter as adapter
from audioldm2_triton.geometry import read_audio_geometry
from audioldm2_triton.settings import resolve_device
from decoder_stage import load_decoder_stage
from decoding_parts import check_decodable, decode_parts


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.name = args["model_name"]
        settings = adapter.model_settings(args)
        device = resolve_device(settings, args["model_instance_kind"], int(args["model_instance_device_id"]))
        geometry = read_audio_geometry(Path(settings.checkpoint))
        self.decoder, self.scorer = load_decoder_stage(settings, geometry, device)
        self.memory = adapter.MemoryGauge(self.name, device)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        responses = adapter.respond_together(
            requests, _parse, partial(decode_parts, self.decoder, self.scorer), self.name
        )
        self.memory.update()
        return responses


def _parse(request: Any) -> tuple[str, dict[str, np.ndarray]]:
    control = str(json.loads(request.parameters() or "{}").get("ctl", ""))
    inputs = adapter.input_arrays(request)
    check_decodable(control, inputs)
    return control, inputs

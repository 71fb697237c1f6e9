"""Triton adapter of the decoder: tensors in, tensors out, errors to codes."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from audioldm2_triton import triton_adapter as adapter
from audioldm2_triton.geometry import read_audio_geometry
from audioldm2_triton.settings import resolve_compile, resolve_device, resolve_dtype
from audioldm2_triton.threads import set_measured_threads
from clap_scores import load_clap_scorer
from decoder_compilation import compile_with_cache
from decoding import warm_up
from decoding_parts import check_decodable, decode_parts
from waveform_decoder import load_waveform_decoder

STAGE = "decoder"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = adapter.model_settings(args)
        device = resolve_device(settings, args["model_instance_kind"], int(args["model_instance_device_id"]))
        dtype = resolve_dtype(settings, device)
        checkpoint = Path(settings.checkpoint)
        geometry = read_audio_geometry(checkpoint)
        self.decoder = load_waveform_decoder(checkpoint, device, dtype)
        self.scorer = load_clap_scorer(checkpoint, device, dtype)
        if device.type == "cpu":
            set_measured_threads(partial(warm_up, self.decoder, self.scorer, geometry))
        if resolve_compile(settings, device):
            self.decoder = compile_with_cache(self.decoder, settings, geometry)
        warm_up(self.decoder, self.scorer, geometry)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return adapter.respond_together(requests, _parse, partial(decode_parts, self.decoder, self.scorer), STAGE)


def _parse(request: Any) -> tuple[str, dict[str, np.ndarray]]:
    control = str(json.loads(request.parameters() or "{}").get("ctl", ""))
    inputs = adapter.input_arrays(request)
    check_decodable(control, inputs)
    return control, inputs

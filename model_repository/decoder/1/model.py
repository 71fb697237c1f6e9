"""Triton adapter of the decoder: tensors in, tensors out, errors to codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from audio_files import with_files
from audioldm2_triton.server import faults
from audioldm2_triton.server import triton_adapter as adapter
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.read_request import ReadRequest
from audioldm2_triton.server.settings import checkpoint_name, resolve_device, resolved_settings
from audioldm2_triton.server.triton_metrics import InfoSeries, MemoryGauge
from audioldm2_triton.server.wanted_file import WantedFile, unpack_wanted
from decoder_stage import load_decoder_stage
from decoding_parts import check_decodable, decode_parts

ParsedRequest: TypeAlias = tuple[str, dict[str, np.ndarray], list[WantedFile]]  # its control and its inputs first


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = adapter.model_settings(args)
        self.checkpoint = checkpoint_name(settings.checkpoint)
        self.default_timeout_in_s = settings.default_timeout_in_s
        device = resolve_device(settings, args["model_instance_kind"], int(args["model_instance_device_id"]))
        self.geometry = read_audio_geometry(Path(settings.checkpoint))
        self.decoder, self.scorer = load_decoder_stage(settings, self.geometry, device)
        self.memory = MemoryGauge(args["model_name"], device)
        self.info = InfoSeries(args["model_name"], resolved_settings(settings, device))
        self.settlements = adapter.open_settlements(args["model_name"])

    def execute(self, requests: Sequence[Any]) -> None:
        taken = adapter.take(requests, adapter.unchanged, self.settlements, self.default_timeout_in_s)
        adapter.answer_together(taken, self._parse, self._decode)
        self.memory.update()

    def finalize(self) -> None:
        adapter.close_settlements(self.settlements)

    def _parse(self, request: ReadRequest) -> ParsedRequest:
        faults.at("decoder.parse")
        check_decodable(request.control, request.inputs, self.geometry, self.scorer.text_dim)
        return request.control, request.inputs, unpack_wanted(request.inputs.get("audio_file"))

    def _decode(self, requests: list[ParsedRequest]) -> list[dict[str, np.ndarray]]:
        results = decode_parts(self.decoder, self.scorer, [(control, inputs) for control, inputs, _ in requests])
        return [
            with_files(wanted, inputs, outputs, self.checkpoint)
            for (_, inputs, wanted), outputs in zip(requests, results, strict=True)
        ]

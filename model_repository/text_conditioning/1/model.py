"""Triton adapter of the text stage: tensors in, tensors out, errors to codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from audio_geometry import read_audio_geometry
from conditioning import condition
from request_rows import parse_rows
from text_encoders import load_text_encoders

from audioldm2_triton import triton_adapter as adapter
from audioldm2_triton.contract import GenerationRow
from audioldm2_triton.settings import resolve_device, resolve_dtype

STAGE = "text_conditioning"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.settings = adapter.model_settings(args)
        checkpoint = Path(self.settings.checkpoint)
        device = resolve_device(self.settings, args["model_instance_kind"], int(args["model_instance_device_id"]))
        self.geometry = read_audio_geometry(checkpoint)
        self.encoders = load_text_encoders(checkpoint, device, resolve_dtype(self.settings, device))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        deadlines = [adapter.deadline_ns(request) for request in requests]
        parsed: list[tuple[GenerationRow, ...] | Exception] = []
        for request in requests:
            try:
                native = self.geometry.native_audio_length_in_s
                parsed.append(parse_rows(adapter.input_arrays(request), self.settings.limits, native))
            except Exception as error:
                parsed.append(error)
        conditioned = self._condition([rows for rows in parsed if not isinstance(rows, Exception)])
        results: list[dict[str, np.ndarray] | Exception] = []
        for rows, deadline in zip(parsed, deadlines, strict=True):
            result = rows if isinstance(rows, Exception) else next(conditioned)
            if not isinstance(result, Exception):
                result = {**result, "deadline_ns": np.full((len(rows), 1), deadline, np.int64)}
            results.append(result)
        return adapter.respond_each(requests, results, STAGE)

    def _condition(self, requests: list[tuple[GenerationRow, ...]]) -> Any:
        """The results of the requests, in order; all of them fail where their common forward does."""
        if not requests:
            return iter(())
        try:
            return iter(condition(self.encoders, self.geometry, requests))
        except Exception as error:
            return iter([error] * len(requests))

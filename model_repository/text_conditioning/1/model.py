"""Triton adapter of the text stage: tensors in, tensors out, errors to codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audioldm2_triton import triton_adapter as adapter
from audioldm2_triton.contract import GenerationRow
from audioldm2_triton.geometry import read_audio_geometry
from audioldm2_triton.settings import resolve_compile, resolve_device, resolve_dtype
from audioldm2_triton.threads import set_measured_threads
from conditioning import condition
from embedding_cache import EmbeddingCache
from request_rows import parse_rows
from text_buckets import TextBuckets
from text_compilation import compile_with_cache
from text_encoders import EncodedTexts, encode_texts, load_text_encoders, tokenize_t5

STAGE = "text_conditioning"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.settings = adapter.model_settings(args)
        checkpoint = Path(self.settings.checkpoint)
        device = resolve_device(self.settings, args["model_instance_kind"], int(args["model_instance_device_id"]))
        self.geometry = read_audio_geometry(checkpoint)
        self.encoders = load_text_encoders(checkpoint, device, resolve_dtype(self.settings, device))
        if device.type == "cpu":
            set_measured_threads(self._encode_one)
        if resolve_compile(self.settings, device):
            self.encoders = compile_with_cache(self.encoders, TextBuckets(), self.settings, STAGE)
        self.cache = EmbeddingCache[EncodedTexts](self.settings.embedding_cache_size)
        # The first request should not pay for what happens once.
        self._encode_one()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return adapter.respond_together(requests, self._parse, self._condition, STAGE)

    def _encode_one(self) -> None:
        tokens = tokenize_t5(self.encoders, "a")
        encode_texts(self.encoders, ["a"], [tokens], [len(tokens)])

    def _parse(self, request: Any) -> tuple[tuple[GenerationRow, ...], int]:
        deadline = adapter.deadline_ns(request)
        native = self.geometry.native_audio_length_in_s
        return parse_rows(adapter.input_arrays(request), self.settings.limits, native), deadline

    def _condition(self, requests: list[tuple[tuple[GenerationRow, ...], int]]) -> list[dict[str, np.ndarray]]:
        resolved = condition(self.encoders, self.cache, self.geometry, [rows for rows, _ in requests])
        return [
            {**tensors, "deadline_ns": np.full((len(rows), 1), deadline, np.int64)}
            for tensors, (rows, deadline) in zip(resolved, requests, strict=True)
        ]

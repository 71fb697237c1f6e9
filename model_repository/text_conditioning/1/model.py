"""Triton adapter of the text stage: tensors in, tensors out, errors to codes."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from audioldm2_triton.audio.encoding import check_encodable
from audioldm2_triton.server import faults
from audioldm2_triton.server import triton_adapter as adapter
from audioldm2_triton.server.clipping import clipping_schedulers
from audioldm2_triton.server.entrance import entrance_of
from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.journal import TENSOR as JOURNAL
from audioldm2_triton.server.journal import Journal
from audioldm2_triton.server.read_request import ReadRequest
from audioldm2_triton.server.request_parameters import check_parameters
from audioldm2_triton.server.settings import resolve_device, resolved_settings
from audioldm2_triton.server.stage_tensors import TEXT_CONDITIONING
from audioldm2_triton.server.stage_thread import StageThread
from audioldm2_triton.server.triton_metrics import InfoSeries, MemoryGauge, Progress, count_texts
from audioldm2_triton.server.wanted_file import split_format
from conditioning import condition
from embedding_cache import EmbeddingCache
from request_rows import parse_rows
from text_encoders import EncodedTexts
from text_stage import load_text_stage

TakenRequest: TypeAlias = adapter.TakenRequest[adapter.Outputs]
ParsedRequest: TypeAlias = tuple[tuple[GenerationRow, ...], ReadRequest]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.model_name = args["model_name"]
        self.settings = adapter.model_settings(args)
        device = resolve_device(self.settings, args["model_instance_kind"], int(args["model_instance_device_id"]))
        self.geometry = read_audio_geometry(Path(self.settings.checkpoint))
        self.clipping = clipping_schedulers(Path(self.settings.checkpoint))
        most_rows = int(json.loads(args["model_config"])["max_batch_size"])
        self.thread: StageThread[TakenRequest] = StageThread(
            *(self.model_name, self._answer, adapter.rows_of, most_rows),
            *(Progress(self.model_name).show, self.settings.scheduling),
        )
        self.encoders = self.thread.run(partial(load_text_stage, self.settings, device))
        self.memory = MemoryGauge(args["model_name"], device)
        self.info = InfoSeries(args["model_name"], resolved_settings(self.settings, device))
        self.settlements = adapter.open_settlements(args["model_name"])
        self.entrance = entrance_of(args["model_name"], TEXT_CONDITIONING)
        self.cache = EmbeddingCache[EncodedTexts](self.settings.embedding_cache_size)
        count_texts(self.model_name, 0, 0)

    def execute(self, requests: Sequence[Any]) -> None:
        # Never blocks, and takes one request at a time: see `config.pbtxt`.
        timeout_in_s = self.settings.default_timeout_in_s
        for taken in adapter.take(requests, adapter.unchanged, self.settlements, timeout_in_s, entrance=self.entrance):
            try:
                self.thread.add(taken, taken.read.priority)
            except BaseException as error:
                taken.settlement.settle(error)

    def finalize(self) -> None:
        self.thread.close()
        adapter.close_settlements(self.settlements)

    def _answer(self, requests: list[TakenRequest], _priority: str) -> None:
        adapter.answer_together(requests, self._parse, self._condition)
        self.memory.update()
        count_texts(self.model_name, *self.cache.take_counts())

    def _parse(self, request: ReadRequest) -> ParsedRequest:
        faults.at("text_conditioning.parse")
        check_parameters(request.parameters)
        native = self.geometry.native_audio_length_in_s
        rows = parse_rows(request.inputs, self.settings.limits, native, self.encoders.speaks, self.clipping)
        if rows[0].audio_format:
            check_encodable(split_format(rows[0].audio_format)[0], self.geometry.sampling_rate)
        return rows, request

    def _condition(self, requests: list[ParsedRequest]) -> list[dict[str, np.ndarray]]:
        full = self.settings.full_negative_prompt == "on"
        resolved = condition(self.encoders, self.cache, self.geometry, [rows for rows, _ in requests], full)
        return [
            {
                **tensors,
                "deadline_ns": np.full((len(rows), 1), request.deadline_ns, np.int64),
                JOURNAL: _journal(rows, request.arrived_ns).tensor(len(rows)),
            }
            for tensors, (rows, request) in zip(resolved, requests, strict=True)
        ]


def _journal(rows: Sequence[GenerationRow], arrived_ns: int) -> Journal:
    return Journal(
        arrived_ns,
        conditioned_ns=time.monotonic_ns(),
        prompts=len(rows),
        waveforms=sum(row.num_waveforms_per_prompt for row in rows),
        steps=max(row.num_inference_steps for row in rows),
        audio_ms=round(rows[0].audio_length_in_s * 1000),
    )

"""Triton adapter of the decoder: tensors in, tensors out, errors to codes."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from audio_files import with_files
from audioldm2_triton.contract import BATCH, INTERACTIVE
from audioldm2_triton.server import faults
from audioldm2_triton.server import triton_adapter as adapter
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.read_request import ReadRequest
from audioldm2_triton.server.settings import checkpoint_name, resolve_device, resolved_settings
from audioldm2_triton.server.stage_tensors import DECODED, MEL, SCORE, VOCODE, WHOLE
from audioldm2_triton.server.stage_thread import StageThread
from audioldm2_triton.server.triton_metrics import InfoSeries, MemoryGauge, Progress
from audioldm2_triton.server.wanted_file import WantedFile, unpack_wanted
from clap_scores import ClapScorer
from decoder_stage import giving_way, interrupted, load_decoder_stage
from decoding_parts import check_decodable, decode_parts
from waveform_decoder import WaveformDecoder

TakenRequest: TypeAlias = adapter.TakenRequest[adapter.Outputs]
ParsedRequest: TypeAlias = tuple[dict[str, np.ndarray], list[WantedFile]]  # its inputs first


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = adapter.model_settings(args)
        self.checkpoint = checkpoint_name(settings.checkpoint)
        self.default_timeout_in_s = settings.default_timeout_in_s
        device = resolve_device(settings, args["model_instance_kind"], int(args["model_instance_device_id"]))
        self.geometry = read_audio_geometry(Path(settings.checkpoint))
        most_rows = int(json.loads(args["model_config"])["max_batch_size"])
        progress = Progress(args["model_name"])
        self.thread: StageThread[TakenRequest] = StageThread(
            *(args["model_name"], self._answer, adapter.rows_of, most_rows), *(progress.show, settings.scheduling)
        )
        parts = self.thread.run(partial(load_decoder_stage, settings, self.geometry, device))
        self.text_dim = parts[1].text_dim
        self.parts = {
            INTERACTIVE: interrupted(*parts, progress.show),
            BATCH: giving_way(*parts, self.thread.give_way, progress.show),
        }
        self.memory = MemoryGauge(args["model_name"], device)
        self.info = InfoSeries(args["model_name"], resolved_settings(settings, device))
        self.settlements = adapter.open_settlements(args["model_name"])

    def execute(self, requests: Sequence[Any]) -> None:
        # Never blocks: the thread answers.
        for taken in adapter.take(requests, adapter.unchanged, self.settlements, self.default_timeout_in_s):
            try:
                self.thread.add(taken, taken.read.priority)
            except BaseException as error:
                taken.settlement.settle(error)

    def finalize(self) -> None:
        self.thread.close()
        adapter.close_settlements(self.settlements)

    def _answer(self, requests: list[TakenRequest], priority: str) -> None:
        # The parts of streams first, since they are short, and each kind is answered when it is done.
        for kind in (VOCODE, MEL, SCORE, WHOLE):
            of_kind = [request for request in requests if _kind(request) == kind]
            adapter.answer_together(of_kind, self._parse, partial(self._decode, *self.parts[priority], kind))
        self.memory.update()

    def _parse(self, request: ReadRequest) -> ParsedRequest:
        faults.at("decoder.parse")
        check_decodable(request.control, request.inputs, self.geometry, self.text_dim)
        return request.inputs, unpack_wanted(request.inputs.get("audio_file"))

    def _decode(
        self, decoder: WaveformDecoder, scorer: ClapScorer, kind: str, requests: list[ParsedRequest]
    ) -> list[dict[str, np.ndarray]]:
        results = decode_parts(decoder, scorer, kind, [inputs for inputs, _ in requests])
        answers = []
        for (inputs, wanted), outputs in zip(requests, results, strict=True):
            decoder.before_forward()  # files take time too
            answers.append(with_files(wanted, inputs, outputs, self.checkpoint))
        return answers


def _kind(request: TakenRequest) -> str:
    """What it asks for; an unknown kind is refused as an ordinary request."""
    return request.read.control if request.read.control in DECODED else WHOLE

"""Triton adapter of the denoiser: requests to the engines, their answers to responses, errors to codes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from audioldm2_triton.errors import invalid
from audioldm2_triton.server import faults, spans
from audioldm2_triton.server import triton_adapter as adapter
from audioldm2_triton.server.entrance import FullSign, entrance_of
from audioldm2_triton.server.journal import TENSOR as JOURNAL
from audioldm2_triton.server.journal import Journal
from audioldm2_triton.server.settings import resolved_settings
from audioldm2_triton.server.settlement import Settlement
from audioldm2_triton.server.stage_tensors import AFTER, CANCEL, CONTROL, DENOISER, JOB, PROGRESS
from audioldm2_triton.server.triton_metrics import InfoSeries
from denoiser_metrics import DenoiserMetrics
from denoiser_stage import load_engines
from denoising_inputs import parse_denoising_request, read_tensor_shapes
from stepping.request import DenoisingRequest


@dataclass(frozen=True)
class Denoised:
    latents: Tensor  # [B, N, C, H, W]
    num_steps: int  # UNet evaluations
    journal: Journal


Answer: TypeAlias = Denoised | tuple[int, int]
"""To an ordinary request; to a control request, the evaluations done and in all."""


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = adapter.model_settings(args)
        self.default_timeout_in_s = settings.default_timeout_in_s
        self.shapes = read_tensor_shapes(settings)
        sign = FullSign(entrance_of(args["model_name"], DENOISER))
        self.metrics = DenoiserMetrics(self.shapes.geometry, args["model_name"], sign)
        self.engines = load_engines(settings, self.shapes.geometry, self.metrics.observer)
        self.metrics.show_limits([engine.limits for engine in self.engines.engines])
        self.settlements = adapter.open_settlements(args["model_name"])
        first = self.engines.engines[0]
        resolved = resolved_settings(settings, first.device) | {
            "engines": str(len(self.engines.engines)),
            "max_active_rows": str(first.limits.max_active_rows),
            "max_waiting": str(first.limits.max_waiting),
        }
        self.info = InfoSeries(args["model_name"], resolved)

    def execute(self, requests: Sequence[Any]) -> None:
        # Never blocks: each request is answered when it is done.
        for taken in adapter.take(requests, _tensors, self.settlements, self.default_timeout_in_s):
            try:
                self._start(taken)
            except BaseException as error:
                taken.settlement.settle(error)

    def finalize(self) -> None:
        try:
            self.engines.close()
            self.metrics.close()
        finally:
            adapter.close_settlements(self.settlements)

    def is_ready(self) -> bool:
        """Returns whether the model is ready; Triton asks from 26.04 on."""
        return self.engines.is_ready

    def _start(self, taken: adapter.TakenRequest[Answer]) -> None:
        read, settlement = taken.read, taken.settlement
        job = str(read.parameters.get(JOB, ""))
        faults.at("denoiser.control" if read.control else "denoiser.parse")
        if read.control == PROGRESS:
            after = read.parameters.get(AFTER, 0)
            if not isinstance(after, int):
                raise invalid(AFTER, after, "a number of evaluations")
            settlement.expect_by(self.engines.deadline_ns(job))
            self.engines.listen(job, after, partial(_settle_progress, settlement))
        elif read.control == CANCEL:
            self.engines.cancel(job)
            settlement.settle((0, 0))
        elif read.control:
            raise invalid(CONTROL, read.control, f"{PROGRESS} or {CANCEL}")
        else:
            request = parse_denoising_request(read.inputs, self.shapes)
            record = taken.record
            on_stepped = record.stepped if spans.are_wanted() else None
            request = replace(request, deadline_ns=read.deadline_ns, on_admitted=record.admitted, on_stepped=on_stepped)
            self.engines.submit(request, partial(self._finish, taken, request), taken.is_cancelled, job)

    def _finish(
        self, taken: adapter.TakenRequest[Answer], request: DenoisingRequest, outcome: Tensor | BaseException
    ) -> None:
        if isinstance(outcome, BaseException):
            taken.settlement.settle(outcome)
        else:
            journal = replace(taken.record.journal, denoised_ns=time.monotonic_ns())
            taken.settlement.settle(Denoised(outcome, self.engines.num_steps(request), journal))


def _settle_progress(settlement: Settlement[Answer], step: int, num_steps: int) -> None:
    settlement.settle((step, num_steps))


def _tensors(outcome: Answer) -> dict[str, np.ndarray]:
    if isinstance(outcome, tuple):
        step, num_steps = outcome
        return {"step": np.array([[step]], np.int32), "num_steps": np.array([[num_steps]], np.int32)}
    faults.at("denoiser.answer")
    latents = outcome.latents.numpy()
    rows = len(latents)
    steps = np.full((rows, 1), outcome.num_steps, np.int32)
    return {"latents": latents, "num_steps": steps, JOURNAL: outcome.journal.tensor(rows)}

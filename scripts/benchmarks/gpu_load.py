"""What is on the device while `scripts/benchmark gpu` measures, and how much it measures."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from audioldm2_triton.server.geometry import AudioGeometry
from benchmarks.reference import load_pipeline
from benchmarks.run import Run
from benchmarks.timing import free_memory
from in_process.stages import Stages
from stepping.denoising_unet import DenoisingUNet, load_unet
from stepping.forward_plan import Bucket


@dataclass(frozen=True)
class Plan:
    """The amount of work measured; a tiny checkpoint is for trying the command out."""

    length_s: float
    long_s: float  # of the long clip
    steps: int
    own_steps: int
    repeats: int
    concurrencies: tuple[int, ...]
    rows: tuple[int, ...]
    compiled_rows: tuple[int, ...]
    requests_in_flight_times: int  # requests per concurrency, in multiples of it


@dataclass
class Loaded:
    """The models on the device: loaded when first requested, dropped when others are."""

    run: Run
    geometry: AudioGeometry
    plan: Plan
    name: str = ""
    held: Any = None
    closing: ExitStack = field(default_factory=ExitStack)

    def pipeline(self, dtype: torch.dtype, compiled: bool) -> Any:
        return self._hold(
            f"pipeline {dtype} {compiled}",
            lambda: load_pipeline(self.run.checkpoint, self.run.device, dtype, compiled),
        )

    def stages(self) -> Stages:
        def load() -> Stages:
            stages = Stages(self.run.settings)
            self.closing.callback(stages.close)
            return stages

        held: Stages = self._hold("stages", load)
        return held

    def unet(self, buckets: Sequence[Bucket], use_compiler: bool) -> DenoisingUNet:
        run = self.run
        load = partial(load_unet, run.checkpoint, self.geometry.latent_width, run.device, run.dtype)
        held: DenoisingUNet = self._hold(f"unet {buckets} {use_compiler}", lambda: load(buckets, use_compiler))
        return held

    def drop(self) -> None:
        self.closing.close()
        self.name, self.held = "", None
        free_memory(self.run.device)

    def _hold(self, name: str, load: Callable[[], Any]) -> Any:
        if name != self.name:
            self.drop()
            self.held = load()
            self.name = name
        return self.held

"""`scripts/benchmark timeline`: a picture of real forwards that mix requests which differ in everything.

One engine, in this process, denoises requests of several schedulers, step counts, guidance scales, lengths and numbers
of candidates; they come at different times, and one is cancelled. When each comes is counted in forwards, so that the
picture is the same on every machine, except for its times and for which lengths share a forward: that depends on what
forwards cost. The plan runs once before, so that everything is warm.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from audioldm2_triton.plot import require_matplotlib
from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.settings import Settings, resolve_device
from benchmarks.measurement import print_table
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.timeline import Planned, Recorder, Timeline
from benchmarks.timeline_pictures import chrome_trace, draw_timeline
from conditioning import condition
from denoiser_stage import load_engines
from denoising_inputs import parse_denoising_request, read_tensor_shapes
from embedding_cache import EmbeddingCache
from engine.engine import Engine
from project import CACHE
from text_stage import load_text_stage

FOLDER: Final = CACHE / "benchmarks"


@dataclass(frozen=True)
class Sketch:
    """A request of the plan; its length is a share of the longest."""

    scheduler: str
    steps: int
    guidance: float
    length: float
    candidates: int
    comes_after: int  # forwards
    cancelled_after: int | None = None

    def row(self, seed: int, longest_s: float) -> GenerationRow:
        return GenerationRow(
            prompt="rain",
            negative_prompt="",
            audio_length_in_s=round(self.length * longest_s, 2),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            num_waveforms_per_prompt=self.candidates,
            seed=seed,
            scheduler=self.scheduler,
            return_scores=False,
        )

    def label(self, longest_s: float) -> str:
        name = self.scheduler.removesuffix("Scheduler").replace("Discrete", "").replace("Solver", "")
        several = f" x{self.candidates}" if self.candidates > 1 else ""
        return f"{name}, {self.steps} steps, guidance {self.guidance:g}, {self.length * longest_s:.2f} s{several}"


PLAN: Final = (
    Sketch("DPMSolverMultistepScheduler", 20, 3.5, 0.5, 1, comes_after=0),
    Sketch("HeunDiscreteScheduler", 8, 5.0, 0.5, 1, comes_after=3),
    Sketch("DDIMScheduler", 12, 1.0, 0.25, 1, comes_after=5),
    Sketch("UniPCMultistepScheduler", 40, 7.5, 1.0, 1, comes_after=8, cancelled_after=24),
    Sketch("EulerDiscreteScheduler", 10, 2.5, 0.5, 3, comes_after=12),
    Sketch("KDPM2DiscreteScheduler", 6, 3.5, 0.25, 2, comes_after=18),
    Sketch("DPMSolverSinglestepScheduler", 4, 3.5, 0.5, 1, comes_after=20),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "timeline")
    parser.add_argument("--audio-length-in-s", type=float, default=2.56, help="of the longest (default: %(default)s)")
    parser.add_argument("--trace", type=Path, default=FOLDER / "timeline.json", help="default: %(default)s")
    parser.add_argument("--picture", type=Path, default=FOLDER / "timeline.png", help="default: %(default)s")


def measure(arguments: argparse.Namespace) -> None:
    require_matplotlib()
    run = read_run(arguments, "timeline")
    with recorded_engine(run.settings) as (engine, recorder):
        plan = make_plan(run.settings, arguments.audio_length_in_s, PLAN)
        recorder.run(engine, plan)
        timeline = recorder.run(engine, plan)
    for path in (arguments.trace, arguments.picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    arguments.trace.write_text(json.dumps(chrome_trace(timeline)))
    draw_timeline(timeline, arguments.picture, _title(run, timeline))
    items = sum(forward.items for forward in timeline.forwards) / len(timeline.forwards)
    record = replace(run.record, path=f"{len(PLAN)} requests, mixed", rows=items, samples=len(timeline.forwards))
    print_table([run.keep(record)], sys.stdout)
    print(f"\n{arguments.trace}\n{arguments.picture}")


def _title(run: Run, timeline: Timeline) -> str:
    served = sum(len(forward.requests) for forward in timeline.forwards)
    return (
        f"{len(timeline.lives)} requests, {len(timeline.forwards)} forwards instead of {served} of one request each; "
        f"{run.record.checkpoint}, {run.record.device}, {run.dtype_name}"
    )


def make_plan(settings: Settings, longest_s: float, sketches: Sequence[Sketch]) -> list[Planned]:
    """Encodes the texts and draws the noise of every request."""
    geometry, shapes = read_audio_geometry(Path(settings.checkpoint)), read_tensor_shapes(settings)
    encoders = load_text_stage(settings, resolve_device(settings))
    rows = [[sketch.row(seed, longest_s)] for seed, sketch in enumerate(sketches)]
    return [
        Planned(
            sketch.label(longest_s),
            parse_denoising_request(tensors, shapes),
            sketch.comes_after,
            sketch.cancelled_after,
        )
        for sketch, tensors in zip(sketches, condition(encoders, EmbeddingCache(0), geometry, rows), strict=True)
    ]


@contextmanager
def recorded_engine(settings: Settings) -> Iterator[tuple[Engine, Recorder]]:
    recorder = Recorder()
    engines = load_engines(settings, read_audio_geometry(Path(settings.checkpoint)), lambda _: recorder)
    try:
        yield engines.engines[0], recorder
    finally:
        engines.close()

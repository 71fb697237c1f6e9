"""`scripts/sound-quality sampling`: what the lossy options lose, by the distance to the solution of the same seed.

The solution is a run of many steps of the same solver. `distance` is of the latents, relative to the solution's norm,
the median over the requests; the time is of the whole denoising.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from audioldm2_triton.server.settings import Settings
from benchmarks.measurement import Record, print_table, with_times
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.workload import make_rows
from in_process.stages import Stages, Tensors, running_stages

SPACINGS = ("", "trailing", "linspace", "karras", "exponential", "lu_lambdas")
INTERVALS = ("0,0.8", "0,0.6", "0.1,0.9", "0.2,0.8")


@dataclass(frozen=True)
class Options:
    length_s: float
    solution_steps: int
    requests: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "sampling")
    parser.add_argument("--audio-length-in-s", type=float, default=2.56)
    parser.add_argument("--solution-steps", type=int, default=200)
    parser.add_argument("--requests", type=int, default=6)


def measure(arguments: argparse.Namespace) -> None:
    options = Options(arguments.audio_length_in_s, arguments.solution_steps, arguments.requests)
    run = read_run(arguments, "sampling", "scripts/sound-quality")
    records = []
    solution, _ = _denoise(run.settings, options, options.solution_steps)
    for path, settings, steps in _variants(run):
        latents, seconds = _denoise(settings, options, steps)
        distance = statistics.median(
            float((mine - exact).norm() / exact.norm()) for mine, exact in zip(latents, solution, strict=True)
        )
        records.append(run.keep(_record(run, options, path, steps, seconds, distance)))
    print_table(records, sys.stdout)


def _variants(run: Run) -> Iterator[tuple[str, Settings, int]]:
    for steps in (8, 12, 20):
        for spacing in SPACINGS:
            yield (
                f"spacing {spacing or 'of the checkpoint'}",
                replace(run.settings, timestep_spacing=spacing),
                steps,
            )
    for interval in INTERVALS:
        yield f"guidance in {interval}", replace(run.settings, guidance_interval=interval), 20


def _denoise(settings: Settings, options: Options, steps: int) -> tuple[Sequence[Tensor], float]:
    """The latents of the requests, denoised together, and the seconds that it took."""
    requests = make_rows(options.requests, options.length_s, steps)
    with running_stages(settings) as stages:
        return _timed(stages, stages.condition(requests))


def _timed(stages: Stages, resolved: Sequence[Tensors]) -> tuple[Sequence[Tensor], float]:
    stages.denoise(resolved)  # the first builds the schedule's table
    start = time.perf_counter()
    latents = stages.denoise(resolved)
    return latents, time.perf_counter() - start


def _record(run: Run, options: Options, path: str, steps: int, seconds: float, distance: float) -> Record:
    record = replace(
        run.record,
        path=path,
        length_s=options.length_s,
        steps=steps,
        guidance=3.5,
        concurrency=options.requests,
        note=f"distance {distance:.4f} to {options.solution_steps} steps",
    )
    return with_times(record, [seconds])

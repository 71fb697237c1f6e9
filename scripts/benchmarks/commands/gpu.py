"""`scripts/benchmark gpu`: what a machine with a GPU should measure, without a server, in calls of a few minutes.

What matters most comes first. Each measurement is written down when it is done, and is not done again by the next call
with the same `--csv`; a call whose time is used up prints what it has and ends. The weights are random and made here:
their cost is that of trained ones. What fails is recorded too, tried again by the next call, and makes this one fail.
"""

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import psutil
import torch

from audioldm2_triton.server.geometry import AudioGeometry, read_audio_geometry
from benchmarks.gpu_load import Loaded, Plan
from benchmarks.gpu_requests import (
    LONG_CLIP_CANDIDATES,
    alone,
    as_it_comes,
    long_clip,
    staggered,
    start_stages,
    throughput,
    twenty_steps,
)
from benchmarks.gpu_steps import attention, eager_step, fixed_step, kernels, parity, peak
from benchmarks.measurement import Record, is_measured, print_table, read_records
from benchmarks.run import Run, add_common_arguments, read_run
from project import CACHE

FAILED: Final = "failed: "


@dataclass(frozen=True)
class Measurement:
    record: Record  # what identifies it
    run: Callable[[Loaded, Record], Record]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "gpu")
    parser.set_defaults(checkpoint=None)
    parser.add_argument("--size", choices=("tiny", "base", "large"), default="base", help="of the weights to make")
    parser.add_argument("--budget-s", type=float, default=500, help="of this call (default: %(default)s)")
    parser.add_argument("--audio-length-in-s", type=float, help="default: the native length; 0.64 with --size tiny")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="measurements whose name has one of these"
    )


def measure(arguments: argparse.Namespace) -> None:
    # Loading PyTorch has taken some of it: half a minute on a machine that has just been started.
    end_after(arguments.budget_s - (time.time() - psutil.Process().create_time()), arguments)
    # Compiled code of a call that was cut short is found again by the next one.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
    arguments.checkpoint = arguments.checkpoint or CACHE / "checkpoints" / arguments.size
    run = read_run(arguments, "gpu")
    geometry = read_audio_geometry(run.checkpoint)
    failures = measure_all(run, geometry, make_plan(arguments, geometry), arguments.only)
    report(arguments, "all measured" if not failures else f"{failures} failed")
    # Threads that compile or step cannot be interrupted, and must not hold up the end.
    os._exit(1 if failures else 0)


def end_after(seconds: float, arguments: argparse.Namespace) -> None:
    """Ends the process when its time is used up, whatever runs at that moment."""

    def end() -> None:
        report(arguments, "the time of this call is used up: call again to go on")
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def report(arguments: argparse.Namespace, outcome: str) -> None:
    print_table([record for record in read_records(arguments.csv) if record.what == "gpu"], sys.stdout)
    print(outcome, flush=True)


def make_plan(arguments: argparse.Namespace, geometry: AudioGeometry) -> Plan:
    if arguments.size == "tiny":
        return Plan(arguments.audio_length_in_s or 0.64, 3.0, 3, 6, 2, (1, 2), (2, 4), (2,), 2)
    length_s = arguments.audio_length_in_s or geometry.native_audio_length_in_s
    return Plan(length_s, 300.0, 20, 200, 5, (1, 8, 31), (2, 8, 16, 32, 62), (2, 32), 3)


def measure_all(run: Run, geometry: AudioGeometry, plan: Plan, only: Sequence[str] = ()) -> int:
    """Does what the CSV does not have yet, in order; returns how many failed."""
    done = [record for record in read_records(run.csv) if not record.note.startswith(FAILED)]
    left = [
        measurement
        for measurement in list_measurements(run, plan)
        if not is_measured(done, measurement.record)
        and (not only or any(text in measurement.record.path for text in only))
    ]
    loaded, failures = Loaded(run, geometry, plan), 0
    for number, measurement in enumerate(left, start=1):
        record = measurement.record
        load = "".join(
            f", {name} {value}" for name, value in (("rows", record.rows), ("requests", record.concurrency)) if value
        )
        print(f"{number} of {len(left)}: {record.path}{load}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            kept = run.keep(measurement.run(loaded, record))
            print(
                f"  {time.perf_counter() - start:.1f} s: {kept.median_ms} ms {kept.note}", file=sys.stderr, flush=True
            )
        except Exception as error:
            # What does not fit or does not compile here must not keep the rest from being done.
            failures += 1
            note = f"{FAILED}{type(error).__name__}: {str(error)[:300]}"
            print(f"  {note}", file=sys.stderr, flush=True)
            run.keep(replace(record, note=note))
            del error
            gc.collect()
            loaded.drop()
    loaded.drop()
    return failures


def list_measurements(run: Run, plan: Plan) -> list[Measurement]:
    """Returns the order of the measurements: the most important first, those that share a load together."""
    base = replace(run.record, length_s=plan.length_s, steps=plan.steps, guidance=3.5)
    plain = replace(base, length_s=None, steps=None, guidance=None)
    single = replace(base, concurrency=1)
    on_gpu = run.device.type == "cuda"
    fixed = "graphs" if on_gpu else "eager"
    measurements = [
        Measurement(replace(plain, path="large product of matrices"), peak),
        Measurement(replace(base, path=f"UNet, {fixed}, against float32", steps=None), parity),
        *(Measurement(replace(base, path="step, eager", rows=float(rows)), eager_step) for rows in plan.rows),
    ]
    if on_gpu:
        graphs = partial(fixed_step, use_compiler=False)
        measurements += [
            *(Measurement(replace(base, path="step, graphs", rows=float(rows)), graphs) for rows in plan.rows),
            *(
                Measurement(replace(base, path="kernels of an eager step", rows=float(rows)), kernels)
                for rows in plan.compiled_rows
            ),
            *(Measurement(replace(plain, path="attention", rows=float(rows)), attention) for rows in (2, 32)),
        ]
    compiled_step = partial(fixed_step, use_compiler=True)
    measurements += [
        Measurement(replace(single, path=f"stages, {fixed}, alone"), alone),
        *(
            Measurement(replace(base, path=f"stages, {fixed}, lock step", concurrency=concurrency), throughput)
            for concurrency in plan.concurrencies
        ),
        Measurement(replace(base, path=f"stages, {fixed}, staggered"), staggered),
        Measurement(replace(single, path="pipeline, one by one, eager"), partial(twenty_steps, compiled=False)),
    ]
    measurements += [
        Measurement(
            replace(single, path=f"{LONG_CLIP_CANDIDATES} candidates of a long clip, offload", length_s=plan.long_s),
            long_clip,
        ),
        Measurement(replace(base, path=f"start of the stages, {fixed}", steps=2), start_stages),
        Measurement(replace(single, path="pipeline as it comes", dtype="float32", steps=plan.own_steps), as_it_comes),
    ]
    if run.settings.compile == "off":
        return measurements
    # Compilers take minutes.
    recipe = Measurement(replace(single, path="guide's recipe, UNet compiled"), partial(twenty_steps, compiled=True))
    steps = [replace(base, path="step, compiled", rows=float(rows)) for rows in plan.compiled_rows]
    return [*measurements, recipe, *(Measurement(record, compiled_step) for record in steps)]

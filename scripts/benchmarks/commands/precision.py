"""`scripts/benchmark precision`: how exact float32 is on a CPU, beside the reference pipeline's own float32.

Both are compared with the reference pipeline in float64, on the same noise: the largest difference of a result as a
share of its peak, the mean over the waveforms, and `ratio`, served to reference, the geometric mean over the waveforms
(see `Distances.ratio`). First the latents, then the other stages, each by itself.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

from audioldm2_triton.contract import SCHEDULERS
from benchmarks.exactness import Distances, latent_distances, load_precisions, stage_distances
from benchmarks.measurement import Record, print_table
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.workload import make_rows
from in_process.stages import running_stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "precision")
    parser.set_defaults(device="cpu", dtype="float32")
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=SCHEDULERS, metavar="NAME")
    parser.add_argument("--num-inference-steps", nargs="+", type=int, default=[2, 20, 50])
    parser.add_argument("--guidance-scales", nargs="+", type=float, default=[1.0, 3.5])
    parser.add_argument("--audio-length-in-s", type=float, default=0.64)
    parser.add_argument("--waveforms", type=int, default=5, help="of each line, 1 to 8 (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "precision")
    print_table([run.keep(record) for record in _measured(run, arguments)], sys.stdout)


def _measured(run: Run, arguments: argparse.Namespace) -> Iterator[Record]:
    length, waveforms = arguments.audio_length_in_s, arguments.waveforms
    shared = replace(run.record, length_s=length, samples=waveforms)
    precisions = load_precisions(run.checkpoint)
    with running_stages(run.settings) as stages:
        for steps in arguments.num_inference_steps:
            for guidance in arguments.guidance_scales:
                for scheduler in arguments.schedulers:
                    request = replace(
                        make_rows(1, length, steps)[0],
                        guidance_scale=guidance,
                        num_waveforms_per_prompt=waveforms,
                        scheduler=scheduler,
                    )
                    (found,) = latent_distances(precisions, stages, [request])
                    line = replace(shared, path=f"latents, {scheduler}", steps=steps, guidance=guidance)
                    yield replace(line, note=_note(found))
        parts = [stage_distances(precisions, stages, request) for request in make_rows(waveforms, length, 1)]
        for name in parts[0]:
            yield replace(shared, path=name, note=_note(sum((part[name] for part in parts), Distances())))


def _note(found: Distances) -> str:
    return f"reference {fmean(found.reference):.1e}, served {fmean(found.served):.1e}, ratio {found.ratio:.2f}"

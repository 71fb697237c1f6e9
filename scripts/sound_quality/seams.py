"""`scripts/sound-quality seams`: whether the windows of long audio can be heard, by the spectral flux at the overlaps.

Three kinds of clips from the same prompts: generated in windows, generated as a whole, and joined from separate clips
with a hard cut in the middle of each overlap, which shows that the measure finds a seam where there is one. The flux
is the mean change of the spectrum's level in dB between the stretches before and after a moment, of two lengths: short
ones find clicks, long ones changes of character. `at seams` is the largest in the middle half of an overlap, `beside`
the largest in a stretch as long in the middle of a window, both averaged; `share` says in how many pairs of an overlap
and a stretch beside it the overlap has more. What has a rhythm, a beginning and an end has other values than 1 and a
half without any seam: so `than the whole` compares the same moments of the same prompts and seeds, with a 95 %
confidence interval.
"""

import argparse
import sys
from dataclasses import replace
from typing import Final

import numpy as np

from audioldm2_triton.server.generation_row import GenerationRow
from benchmarks.measurement import Record, print_table
from benchmarks.run import add_common_arguments, read_run
from benchmarks.workload import PROMPTS, make_rows
from in_process.stages import Stages, running_stages
from sound_quality.spectral_flux import SeamFlux, flux_difference, seam_flux
from sound_quality.window_layout import Layout, make_layout

WHOLE: Final = "as a whole"
SCALES_IN_S: Final = (0.02, 0.3)  # clicks; changes of character


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "seams")
    parser.add_argument("--window-length-in-s", type=float, help="default: the checkpoint's native length")
    parser.add_argument("--windows", type=int, default=5, help="of each clip, at least 2 (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=8, help="of each kind (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="taken in turn")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "seams", "scripts/sound-quality")
    with running_stages(run.settings) as stages:
        layout = make_layout(stages.geometry, arguments.window_length_in_s, arguments.windows)
        rows = [
            replace(row, prompt=arguments.prompts[index % len(arguments.prompts)])
            for index, row in enumerate(make_rows(arguments.clips, layout.length, arguments.num_inference_steps))
        ]
        kinds = {
            "in windows": [_audio(stages, replace(row, window_length_in_s=layout.window)) for row in rows],
            WHOLE: [_audio(stages, row) for row in rows],
            "joined by cuts": [_joined(stages, row, layout) for row in rows],
        }
        rate = stages.geometry.sampling_rate
    shared = replace(
        run.record,
        length_s=layout.length,
        steps=arguments.num_inference_steps,
        guidance=rows[0].guidance_scale,
        samples=arguments.clips,
    )
    print(f"{layout.count} windows of {layout.window:g} s, overlaps of {layout.overlap:g} s")
    fluxes = {
        (kind, scale): seam_flux(clips, rate, scale, layout.seams, layout.between)
        for kind, clips in kinds.items()
        for scale in SCALES_IN_S
    }
    print_table(
        [run.keep(_record(shared, kind, scale, flux, fluxes[WHOLE, scale])) for (kind, scale), flux in fluxes.items()],
        sys.stdout,
    )


def _record(shared: Record, kind: str, scale_in_s: float, flux: SeamFlux, whole: SeamFlux) -> Record:
    more, low, high = flux_difference(flux, whole)
    return replace(
        shared,
        path=f"{kind}, {1000 * scale_in_s:.0f} ms",
        note=f"at seams {flux.at_seams:.2f} dB, beside {flux.beside:.2f} dB, ratio {flux.ratio:.3f}, "
        f"share {flux.share:.2f} of {flux.pairs}; {more:+.2f} dB ({low:+.2f} to {high:+.2f}) than the whole",
    )


def _audio(stages: Stages, row: GenerationRow) -> np.ndarray:
    return stages.generate(row)[0, 0]


def _joined(stages: Stages, row: GenerationRow, layout: Layout) -> np.ndarray:
    """Joins separate clips to one of the same length, cut in the middle of each overlap."""
    rate = stages.geometry.sampling_rate
    edges = [0.0, *((first + last) / 2 for first, last in layout.seams), layout.length]
    parts = []
    for index in range(layout.count):
        own = replace(row, audio_length_in_s=layout.window, seed=1000 * (row.seed + 1) + index)
        first, stop = (round((edge - index * layout.step) * rate) for edge in edges[index : index + 2])
        parts.append(_audio(stages, own)[first:stop])
    return np.concatenate(parts)

"""`scripts/benchmark stages`: where the time of one request goes, and how much of what the device can do is used.

The stages run in this process, one after the other; the reference pipeline does the same parts in the same run. What
the server adds is the difference between its latency and that of the same stages here.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

import torch

from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.settings import DTYPES
from benchmarks.commands.latency import has_triton, served
from benchmarks.flops import count_gflop, decoder_gflop, peak_gflop_per_s, unet_gflop
from benchmarks.measurement import Record, print_table, with_latencies, with_times
from benchmarks.reference import load_pipeline, run_pipeline, use_dpm_solver
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.timing import free_memory, peak_memory_mib, time_once, time_repeatedly
from benchmarks.workload import make_rows
from in_process.stages import Stages, running_stages

Times: TypeAlias = dict[str, list[float]]  # seconds, by part

NOTES: Final = {
    ("stages", "all"): "the sum",
    ("pipeline", "denoiser"): "text and loop, less the text",
    ("pipeline", "step"): "the loop over its steps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "stages")
    parser.add_argument("--audio-length-in-s", type=float, help="default: the checkpoint's native length")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference-dtype", choices=DTYPES, help="of the pipeline (default: as --dtype)")
    parser.add_argument("--without-server", action="store_true", help="leave out what Triton adds")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "stages")
    geometry = read_audio_geometry(run.checkpoint)
    length_s = arguments.audio_length_in_s or geometry.native_audio_length_in_s
    # What is compiled is compiled for what is measured.
    run = replace(run, settings=replace(run.settings, compile_lengths_in_s=f"{length_s:g}"))
    reference = run
    if arguments.reference_dtype:
        reference = run.in_dtype(arguments.reference_dtype)
    (request,) = make_rows(1, length_s, arguments.num_inference_steps)
    base = replace(
        run.record,
        length_s=length_s,
        steps=request.num_inference_steps,
        guidance=request.guidance_scale,
        rows=2.0 if request.do_classifier_free_guidance else 1.0,
        concurrency=1,
    )
    peak = peak_gflop_per_s(run.device, run.dtype)
    frames, width = geometry.latent_frames(length_s), geometry.latent_width
    unet = unet_gflop(run.checkpoint, int(base.rows or 1), frames, width)
    gflops = {
        "step": unet,
        "denoiser": unet * request.num_inference_steps,
        "decoder": decoder_gflop(run.checkpoint, frames, width),
    }
    records = []
    for whose, own, measure_parts in (("stages", run, stage_times), ("pipeline", reference, pipeline_times)):
        free_memory(run.device)
        times, text_gflop = measure_parts(own, request, arguments.repeats)
        memory = peak_memory_mib(run.device)
        for part, seconds in times.items():
            note = NOTES.get((whose, part), "")
            record = with_times(replace(base, path=f"{whose}: {part}", note=note, dtype=own.dtype_name), seconds)
            record = with_roofline(record, {**gflops, "text": text_gflop}.get(part), peak)
            records.append(run.keep(replace(record, peak_memory_mib=memory if part == "all" else None)))
    if not arguments.without_server:
        records += server_overhead(run, request, base, arguments.repeats)
    print(f"a large product of matrices: {peak:.0f} GFLOP/s")
    print_table(records, sys.stdout)
    _print_ratios(records)


def with_roofline(record: Record, gflop: float | None, peak: float) -> Record:
    if gflop is None or record.median_ms is None:
        return record
    return replace(record, gflop=gflop, roofline_share=gflop / (record.median_ms / 1000) / peak)


def stage_times(run: Run, request: GenerationRow, repeats: int) -> tuple[Times, float | None]:
    """Returns the times of the parts, and the FLOPs of the text stage, which cannot be counted in compiled code."""
    with running_stages(run.settings) as stages:
        times = times_of_stages(stages, request, repeats)
        return times, None if run.compiles else count_gflop(lambda: stages.condition([request]))


def times_of_stages(stages: Stages, request: GenerationRow, repeats: int) -> Times:
    """One request through the stages in turn, several times, after one to warm up."""
    times: Times = {"text": [], "denoiser": [], "step": [], "decoder": [], "all": []}
    (text,) = stages.condition([request])
    latents = stages.denoise([text])[0].numpy()
    parts: dict[str, Callable[[], object]] = {
        "text": lambda: stages.condition([request]),
        "denoiser": lambda: stages.denoise([text]),
        "decoder": lambda: stages.decode([{**text, "latents": latents}]),
    }
    for repeat in range(repeats + 1):
        stages.step_times.clear()
        measured = {part: time_once(work, stages.device) for part, work in parts.items()}
        if repeat:
            for part, seconds in measured.items():
                times[part].append(seconds)
            times["all"].append(sum(measured.values()))
            times["step"].append(stages.step_times.median(2 if request.do_classifier_free_guidance else 1))
    return times


def pipeline_times(run: Run, request: GenerationRow, repeats: int) -> tuple[Times, float]:
    """The reference's own time for the same parts: `encode_prompt`, the loop, VAE and vocoder."""
    pipeline = load_pipeline(run.checkpoint, run.device, run.dtype)
    use_dpm_solver(pipeline)

    def encode() -> None:
        with torch.no_grad():
            pipeline.encode_prompt(
                request.prompt,
                run.device,
                1,
                request.do_classifier_free_guidance,
                negative_prompt=request.negative_prompt,
            )

    def denoise(steps: int) -> Any:
        return pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            audio_length_in_s=request.audio_length_in_s,
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
        ).audios

    latents = denoise(1)

    @torch.no_grad()
    def decode() -> None:
        mel = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        pipeline.mel_spectrogram_to_waveform(mel)

    def timed(work: Callable[[], object]) -> list[float]:
        return time_repeatedly(work, repeats, run.device)

    text, decoding = timed(encode), timed(decode)
    whole = timed(lambda: run_pipeline(pipeline, request))
    encoded_and_denoised = timed(lambda: denoise(request.num_inference_steps))
    loop = [seconds - statistics.median(text) for seconds in encoded_and_denoised]
    times = {
        "text": text,
        "denoiser": loop,
        "step": [seconds / request.num_inference_steps for seconds in loop],
        "decoder": decoding,
        "all": whole,
    }
    return times, count_gflop(encode)


def server_overhead(run: Run, request: GenerationRow, base: Record, repeats: int) -> list[Record]:
    """The same request through the server and through the same stages in one process, in turns."""
    if not has_triton():
        print("no Triton server here: what it adds is left out", file=sys.stderr)
        return []
    inside: list[float] = []
    outside: list[float] = []
    with served(run, request) as generate, running_stages(run.settings) as stages:
        for repeat in range(repeats + 2):
            here = time_once(lambda: stages.generate(request), stages.device)
            there = time_once(generate, torch.device("cpu"))
            if repeat > 1:
                inside.append(here)
                outside.append(there)
    overhead = statistics.median(outside) / statistics.median(inside) - 1
    return [
        run.keep(with_latencies(replace(base, path="one process, in turns with the server"), inside)),
        run.keep(with_latencies(replace(base, path="server", note=f"Triton adds {100 * overhead:.1f} %"), outside)),
    ]


def _print_ratios(records: Sequence[Record]) -> None:
    medians = {record.path: record.median_ms for record in records}
    for path, median in medians.items():
        whose, _, part = path.partition(": ")
        reference = medians.get(f"pipeline: {part}")
        if whose == "stages" and median and reference:
            print(f"{part}: the pipeline takes {reference / median:.2f} times as long")

"""`scripts/benchmark latency`: one request alone, four ways in one run.

The pipeline as it comes (fp32, the checkpoint's own scheduler, 200 steps), the recipe of the guide to AudioLDM 2
(compiled UNet, DPM-Solver++, 20 steps), the stages in one process, and the server.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.geometry import read_audio_geometry
from benchmarks.measurement import Record, print_table, with_latencies
from benchmarks.reference import load_pipeline, run_pipeline, use_dpm_solver
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.timing import free_memory, peak_memory_mib, time_repeatedly
from benchmarks.workload import make_rows
from in_process.stages import running_stages
from serving.installation import InstallationError, find_triton

AS_IT_COMES: Final = "pipeline as it comes"
RECIPE: Final = "guide's recipe"
IN_PROCESS: Final = "stages in one process"
SERVED: Final = "server"
WAYS: Final = (AS_IT_COMES, RECIPE, IN_PROCESS, SERVED)


@dataclass(frozen=True)
class Options:
    request: GenerationRow
    own_steps: int  # of the checkpoint's own scheduler
    scale_from: int  # steps to run of these; 0: all of them
    repeats: int
    compile_recipe: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "latency")
    parser.add_argument("--audio-length-in-s", type=float, help="default: the checkpoint's native length")
    parser.add_argument("--num-inference-steps", type=int, default=20, help="of DPM-Solver++ (default: %(default)s)")
    parser.add_argument("--own-steps", type=int, default=200, help="of the pipeline as it comes (default: %(default)s)")
    parser.add_argument(
        "--scale-from", type=int, default=0, metavar="N", help="run half of N and N of these steps, and scale up"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipe-uncompiled", action="store_true", help="leave out the guide's torch.compile")
    parser.add_argument("--skip", choices=WAYS, nargs="+", default=[], help="ways to leave out")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "latency")
    length_s = arguments.audio_length_in_s or read_audio_geometry(run.checkpoint).native_audio_length_in_s
    (request,) = make_rows(1, length_s, arguments.num_inference_steps)
    options = Options(
        request, arguments.own_steps, arguments.scale_from, arguments.repeats, not arguments.recipe_uncompiled
    )
    measures = {
        AS_IT_COMES: measure_as_it_comes,
        RECIPE: measure_recipe,
        IN_PROCESS: measure_in_process,
        SERVED: measure_served,
    }
    records = []
    for way, measure_way in measures.items():
        if way not in arguments.skip:
            print(f"measuring: {way}", file=sys.stderr)
            measured = measure_way(run, options)
            if measured is not None:
                records.append(run.keep(measured))
    print_table(records, sys.stdout)
    _print_ratios(records)


def base_record(run: Run, options: Options, path: str) -> Record:
    request = options.request
    return replace(
        run.record,
        path=path,
        length_s=request.audio_length_in_s,
        steps=request.num_inference_steps,
        guidance=request.guidance_scale,
        concurrency=1,
    )


def measure_as_it_comes(run: Run, options: Options) -> Record:
    """Loads the pipeline in float32, its default, whatever dtype the others use."""
    free_memory(run.device)
    pipeline = load_pipeline(run.checkpoint, run.device, torch.float32)

    def times(steps: int) -> list[float]:
        return time_repeatedly(lambda: run_pipeline(pipeline, options.request, steps), options.repeats, run.device)

    record = replace(base_record(run, options, AS_IT_COMES), steps=options.own_steps, dtype="float32")
    if not options.scale_from:
        record = with_latencies(record, times(options.own_steps))
    else:
        few, many = max(1, options.scale_from // 2), options.scale_from
        seconds = scale_up(few, statistics.median(times(few)), many, statistics.median(times(many)), options.own_steps)
        scaled = with_latencies(record, [seconds])
        note = f"scaled up from {options.repeats} runs each of {few} and {many} steps"
        record = replace(scaled, samples=None, p50_ms=None, p95_ms=None, p99_ms=None, note=note)
    return replace(record, peak_memory_mib=peak_memory_mib(run.device))


def scale_up(few: int, few_seconds: float, many: int, many_seconds: float, steps: int) -> float:
    """Returns the time of `steps`, extrapolated linearly from two measured numbers of steps."""
    return many_seconds + (many_seconds - few_seconds) / (many - few) * (steps - many)


def measure_recipe(run: Run, options: Options) -> Record:
    free_memory(run.device)
    pipeline = load_pipeline(run.checkpoint, run.device, run.dtype, compiled=options.compile_recipe)
    use_dpm_solver(pipeline)
    # Compiled code changes once more at the second run, when CUDA graphs are recorded.
    seconds = time_repeatedly(lambda: run_pipeline(pipeline, options.request), options.repeats, run.device, warm_up=3)
    note = "UNet compiled" if options.compile_recipe else "UNet not compiled"
    return _done(run, replace(base_record(run, options, RECIPE), note=note), seconds)


def measure_in_process(run: Run, options: Options) -> Record:
    free_memory(run.device)
    with running_stages(run.settings) as stages:
        seconds = time_repeatedly(lambda: stages.generate(options.request), options.repeats, run.device, warm_up=2)
    return _done(run, replace(base_record(run, options, IN_PROCESS), note=_compiled(run)), seconds)


def measure_served(run: Run, options: Options) -> Record | None:
    if not has_triton():
        print("no Triton server here: left out", file=sys.stderr)
        return None
    with served(run, options.request) as generate:
        seconds = time_repeatedly(generate, options.repeats, torch.device("cpu"), warm_up=2)
    # The memory is that of other processes.
    return with_latencies(replace(base_record(run, options, SERVED), note=_compiled(run)), seconds)


@contextmanager
def served(run: Run, request: GenerationRow) -> Iterator[Callable[[], None]]:
    """Starts a server; yields it, and a function that sends the request over gRPC and waits for the audio."""
    from audioldm2_triton import AudioLDM2Client
    from serving.local_server import local_server

    # Texts are encoded anew: the same one comes again and again here.
    arguments = (*run.serve_arguments, "--embedding-cache-size=0")
    with (
        tempfile.TemporaryDirectory() as directory,
        local_server(run.checkpoint, Path(directory) / "log", *arguments) as server,
        AudioLDM2Client(server.grpc_url) as client,
    ):
        client.server_info()

        def generate() -> None:
            client.generate(
                request.prompt,
                negative_prompt=request.negative_prompt,
                audio_length_in_s=request.audio_length_in_s,
                num_inference_steps=request.num_inference_steps,
                seed=request.seed,
            )

        yield generate


def has_triton() -> bool:
    """Returns whether Triton and its client are installed."""
    try:
        import tritonclient.grpc  # noqa: F401

        with tempfile.TemporaryDirectory() as directory:
            find_triton(Path(directory))
    except (ImportError, InstallationError):
        return False
    return True


def _done(run: Run, record: Record, seconds: list[float]) -> Record:
    return replace(with_latencies(record, seconds), peak_memory_mib=peak_memory_mib(run.device))


def _compiled(run: Run) -> str:
    return "compiled" if run.compiles else "not compiled"


def _print_ratios(records: list[Record]) -> None:
    fastest = next((record for record in reversed(records) if record.path in (IN_PROCESS, SERVED)), None)
    for record in records:
        if fastest is not None and record is not fastest and record.median_ms and fastest.median_ms:
            print(f"{record.path}: {record.median_ms / fastest.median_ms:.2f} times the latency of the {fastest.path}")

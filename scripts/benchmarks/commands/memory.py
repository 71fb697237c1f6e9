"""`scripts/benchmark memory`: the most memory that each stage holds for one request, by the length of the audio.

A real server answers one request per length; between them the peaks of its processes start anew. With `--reference`
the pipeline does the same, each length in a process of its own: where it runs out of memory, that is its record's note.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton import AudioChunk, AudioLDM2Client
from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.settings import SWITCH
from benchmarks.measurement import Record, print_table
from benchmarks.reference import load_pipeline, run_pipeline, use_dpm_solver
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.server_memory import reset_peak, server_processes, watching
from benchmarks.timing import free_memory, peak_memory_mib, time_once
from benchmarks.workload import make_rows
from serving.local_server import LocalServer, local_server
from serving.metrics import read_metrics

MIB: Final = 2**20


@dataclass(frozen=True)
class Timeline:
    """Seconds from the request to each; the first two where the audio came in chunks."""

    first_chunk: float | None
    last_chunk: float | None
    answer: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "memory")
    parser.add_argument("--audio-length-in-s", type=float, nargs="+", default=[2.0, 10.0], metavar="S")
    parser.add_argument("--num-inference-steps", type=int, default=1)
    parser.add_argument("--num-waveforms-per-prompt", type=int, default=1)
    parser.add_argument("--guidance-scale", type=float, default=3.5, help="up to 1: none (default: %(default)s)")
    parser.add_argument("--stream", action="store_true", help="by `audioldm2_stream`, with the times of the chunks")
    parser.add_argument("--reference", action="store_true", help="the pipeline too")
    parser.add_argument("--offload", choices=SWITCH, default="off", help="of the server (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "memory")
    run = replace(run, settings=replace(run.settings, offload=arguments.offload))
    requests = [
        replace(
            request,
            guidance_scale=arguments.guidance_scale,
            num_waveforms_per_prompt=arguments.num_waveforms_per_prompt,
            return_scores=arguments.num_waveforms_per_prompt > 1,
        )
        for length in sorted(arguments.audio_length_in_s)
        for request in make_rows(1, length, arguments.num_inference_steps)
    ]
    records = []
    with (
        tempfile.TemporaryDirectory() as directory,
        local_server(run.checkpoint, Path(directory) / "log", *run.serve_arguments) as server,
        AudioLDM2Client(server.grpc_url) as client,
    ):
        client.server_info()
        for request in requests:
            records += measure_served(run, server, client, request, arguments.stream)
    if arguments.reference:
        records += [run.keep(measure_reference(run, request)) for request in requests]
    print_table(records, sys.stdout)


def measure_served(
    run: Run, server: LocalServer, client: AudioLDM2Client, request: GenerationRow, streamed: bool
) -> list[Record]:
    """Returns a record for each process of the server, and for each time measured by the client."""
    processes = server_processes(server.process.pid)
    before = {name: reset_peak(process) for name, process in processes.items()}
    with watching(processes) as highest:
        timeline = _send(client, request, streamed)
    peaks = highest.each
    base = base_record(run, request)
    records = [
        replace(base, path=name, peak_memory_mib=peaks[name] / MIB, note=f"before {before[name] / MIB:.0f} MiB")
        for name in processes
    ]
    records.append(replace(base, path="all", peak_memory_mib=sum(peaks.values()) / MIB, note="the sum of these peaks"))
    records.append(
        replace(base, path="all at once", peak_memory_mib=highest.at_once / MIB, note="the most at one time")
    )
    records += [
        replace(base, path=f"{stage} on {device}", peak_memory_mib=value / MIB, note="since the start of the server")
        for (stage, device), value in device_peaks(read_metrics(server.metrics_port)).items()
        if device != "cpu"
    ]
    times = {"first chunk": timeline.first_chunk, "last chunk": timeline.last_chunk, "answer": timeline.answer}
    records += [replace(base, path=name, median_ms=1000 * value) for name, value in times.items() if value is not None]
    if run.settings.offload == "on":
        records = [replace(record, path=f"{record.path}, offload") for record in records]
    return [run.keep(record) for record in records]


def base_record(run: Run, request: GenerationRow) -> Record:
    items = request.num_waveforms_per_prompt * (2 if request.guidance_scale > 1 else 1)
    return replace(
        run.record,
        length_s=request.audio_length_in_s,
        steps=request.num_inference_steps,
        guidance=request.guidance_scale,
        rows=items,
        concurrency=1,
        samples=1,
    )


def device_peaks(metrics: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Bytes by stage and device, from the server's own gauge."""
    peaks = {}
    for name, value in metrics.items():
        family, _, labels = name.partition("{")
        if family == "audioldm2_peak_memory_bytes" and labels:
            told = dict(label.split("=") for label in labels.rstrip("}").split(","))
            peaks[told["model"].strip('"'), told["device"].strip('"')] = value
    return peaks


def _send(client: AudioLDM2Client, request: GenerationRow, streamed: bool) -> Timeline:
    # An empty text is as none; a transcription, even an empty one, is refused by checkpoints that do not speak.
    given = {name: value for name, value in asdict(request).items() if value != ""}
    prompt = given.pop("prompt")
    start = time.perf_counter()
    if not streamed:
        client.generate([prompt], **given)  # a list: by the ensemble
        return Timeline(None, None, time.perf_counter() - start)
    chunks = [time.perf_counter() - start for event in client.stream(prompt, **given) if isinstance(event, AudioChunk)]
    return Timeline(chunks[0], chunks[-1], time.perf_counter() - start)


def measure_reference(run: Run, request: GenerationRow) -> Record:
    base = replace(base_record(run, request), path="pipeline")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        work = pool.submit(run_reference, run.checkpoint, run.device, run.dtype, request)
        try:
            before, peak, seconds = work.result()
        except (MemoryError, RuntimeError) as error:  # what PyTorch raises, and where the process was killed
            return replace(base, samples=0, note=f"failed: {type(error).__name__}: {error}"[:200])
    note = "" if before is None else f"before {before:.0f} MiB"
    return replace(base, peak_memory_mib=peak, median_ms=1000 * seconds, note=note)


def run_reference(
    checkpoint: Path, device: torch.device, dtype: torch.dtype, request: GenerationRow
) -> tuple[float | None, float | None, float]:
    """Returns the peak in MiB before and after, and the seconds, in this process."""
    pipeline = load_pipeline(checkpoint, device, dtype)
    use_dpm_solver(pipeline)
    free_memory(device)
    before = peak_memory_mib(device)
    seconds = time_once(lambda: run_pipeline(pipeline, request), device)
    return before, peak_memory_mib(device), seconds

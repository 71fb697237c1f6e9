"""`scripts/benchmark load`: perf_analyzer against the server, and the same load one by one through the pipeline."""

import argparse
import csv
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import torch

from benchmarks.perf_analyzer import LoadResult, install_perf_analyzer, run_load, write_input_data
from benchmarks.setting import CACHE
from serving.local_server import local_server
from serving.metrics import read_metrics

PROMPTS: Final = (
    "A hammer hits a wooden surface",
    "rain",
    "A dog barks twice in the distance while leaves rustle in the wind",
    "Techno music with a strong, upbeat tempo and high melodic riffs",
    "a clock ticks",
    "The choir of an old cathedral sings while its bells ring",
    "An engine idles, then revs up and drives away",
    "birds sing over a quiet lake",
)
NEGATIVE_PROMPTS: Final = ("", "low quality", "noise and hum")
FIELDS: Final = (
    *("device", "dtype", "torch", "checkpoint", "length_s", "steps", "guidance", "path", "concurrency", "requests"),
    *("clips_per_s", "p50_ms", "p95_ms", "p99_ms", "rows_per_forward"),
)


@dataclass(frozen=True)
class LoadOptions:
    checkpoint: Path
    audio_length_in_s: float
    num_inference_steps: int
    concurrencies: tuple[int, ...]
    request_count: int  # per concurrency
    csv_file: Path | None
    cache: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--audio-length-in-s", type=float, default=0.64)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=32, help="per concurrency (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="where to write the table")


def measure(arguments: argparse.Namespace) -> None:
    options = LoadOptions(
        checkpoint=arguments.checkpoint,
        audio_length_in_s=arguments.audio_length_in_s,
        num_inference_steps=arguments.num_inference_steps,
        concurrencies=tuple(arguments.concurrency),
        request_count=arguments.requests,
        csv_file=arguments.csv,
        cache=CACHE,
    )
    measure_load(options, sys.stdout)


def measure_load(options: LoadOptions, out: TextIO) -> None:
    """Prints the table, and writes it as CSV where asked to. All of it is one run on one machine."""
    requests = make_requests(options)
    rows = [_row(options, "diffusers, one by one", 1, len(requests), measure_pipeline(options, requests), None)]
    with tempfile.TemporaryDirectory() as directory:
        input_data = Path(directory) / "requests.json"
        write_input_data(input_data, requests)
        binary = install_perf_analyzer(options.cache / "perf_analyzer")
        with local_server(options.checkpoint, Path(directory) / "log") as server:
            for protocol, port in (("grpc", server.grpc_port), ("http", server.http_port)):
                for concurrency in options.concurrencies:
                    count = max(options.request_count, concurrency)
                    before = _forwards(server.metrics_port)
                    result = run_load(binary, protocol, port, input_data, concurrency, count)
                    after = _forwards(server.metrics_port)
                    shared = (after[0] - before[0]) / max(1.0, after[1] - before[1])
                    rows.append(_row(options, f"Triton, {protocol}", concurrency, count, result, shared))
                    print(f"{protocol} {concurrency}: {result.throughput:.2f}/s", file=out, flush=True)
    _print_table(rows, out)
    if options.csv_file is not None:
        with options.csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def make_requests(options: LoadOptions) -> list[dict[str, Any]]:
    """Varied prompts, negative prompts and seeds; the same arithmetic in each, so that latencies can be compared."""
    return [
        {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "negative_prompt": NEGATIVE_PROMPTS[index % len(NEGATIVE_PROMPTS)],
            "audio_length_in_s": options.audio_length_in_s,
            "num_inference_steps": options.num_inference_steps,
            "seed": index,
        }
        for index in range(24)
    ]


def measure_pipeline(options: LoadOptions, requests: Sequence[dict[str, Any]]) -> LoadResult:
    """The same requests through `diffusers.AudioLDM2Pipeline`, one after another, after one to warm up."""
    import diffusers

    pipeline: Any = diffusers.AudioLDM2Pipeline.from_pretrained(options.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    latencies = []
    for request in [requests[0], *requests]:
        start = time.perf_counter()
        pipeline(
            request["prompt"],
            negative_prompt=request["negative_prompt"],
            audio_length_in_s=request["audio_length_in_s"],
            num_inference_steps=request["num_inference_steps"],
            generator=torch.Generator().manual_seed(request["seed"]),
        )
        latencies.append(1000 * (time.perf_counter() - start))
    measured = np.array(latencies[1:])
    return LoadResult(1, 1000 / measured.mean(), *np.percentile(measured, [50, 95, 99]).tolist())


def _forwards(metrics_port: int) -> tuple[float, float]:
    """UNet batch items and forwards so far."""
    metrics = read_metrics(metrics_port)
    return metrics["audioldm2_rows_per_forward_sum"], metrics["audioldm2_rows_per_forward_count"]


def _row(
    options: LoadOptions, path: str, concurrency: int, requests: int, result: LoadResult, shared: float | None
) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "dtype": "float16" if torch.cuda.is_available() else "float32",
        "torch": torch.__version__,
        "checkpoint": options.checkpoint.name,
        "length_s": options.audio_length_in_s,
        "steps": options.num_inference_steps,
        "guidance": 3.5,
        "path": path,
        "concurrency": concurrency,
        "requests": requests,
        "clips_per_s": round(result.throughput, 3),
        "p50_ms": round(result.p50),
        "p95_ms": round(result.p95),
        "p99_ms": round(result.p99),
        "rows_per_forward": "" if shared is None else round(shared, 1),
    }


def _print_table(rows: Sequence[dict[str, Any]], out: TextIO) -> None:
    columns = ("path", "concurrency", "requests", "clips_per_s", "p50_ms", "p95_ms", "p99_ms", "rows_per_forward")
    first = rows[0]
    print(", ".join(f"{name} {first[name]}" for name in FIELDS[:7]), file=out)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), file=out)
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in columns) + " |", file=out)

"""`scripts/benchmark coldstart`: from the start of `scripts/serve` until it is ready, and until its first answer.

With compilation and nothing kept, with the compiled code that this left in PyTorch's folder, and without compilation.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final
from unittest.mock import patch

from audioldm2_triton import AudioLDM2Client
from benchmarks.measurement import Record, print_table, with_times
from benchmarks.run import Run, add_common_arguments, read_run
from serving.local_server import local_server

GIVEN_UP: Final = "going on without"  # what the stages log where the compiler fails
COMPILER_CACHES: Final = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # kernels lie in the second, where it is set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "coldstart")
    parser.add_argument("--audio-length-in-s", type=float, default=0.64, help="compiled for (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1)


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "coldstart")
    length_s: float = arguments.audio_length_in_s
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for path, compiles in (
                ("compiled, nothing kept", True),
                ("compiled, with what was kept", True),
                ("not compiled", False),
            ):
                print(f"starting: {path}", file=sys.stderr)
                times.setdefault(path, []).append(_start(run, length_s, compiles, cache))
    records = []
    for path, measured in times.items():
        base = replace(run.record, length_s=length_s)
        records.append(_record(run, base, f"{path}: ready", [ready for ready, _ in measured]))
        records.append(_record(run, base, f"{path}: first answer after that", [first for _, first in measured]))
    print_table(records, sys.stdout)


def _record(run: Run, base: Record, path: str, seconds: list[float]) -> Record:
    return run.keep(with_times(replace(base, path=path), seconds))


def _start(run: Run, length_s: float, compiles: bool, cache: str) -> tuple[float, float]:
    """Seconds until the server is ready, and from then to its first answer."""
    settings = replace(
        run.settings,
        compile="on" if compiles else "off",
        compile_lengths_in_s=f"{length_s:g}",
    )
    arguments = replace(run, settings=settings).serve_arguments
    with tempfile.TemporaryDirectory() as directory, compiled_code_in(cache):
        start = time.perf_counter()
        with local_server(run.checkpoint, Path(directory) / "log", *arguments) as server:
            ready = time.perf_counter()
            with AudioLDM2Client(server.grpc_url) as client:
                client.generate("rain", audio_length_in_s=length_s, num_inference_steps=2, seed=0)
            first = time.perf_counter()
        if GIVEN_UP in (log := (Path(directory) / "log").read_text()):
            failed = next(line for line in log.splitlines() if GIVEN_UP in line)
            raise RuntimeError(f"the server could not compile: {failed[:300]}")
    return ready - start, first - ready


@contextmanager
def compiled_code_in(folder: str) -> Iterator[None]:
    """Sets where PyTorch keeps compiled code in the processes started meanwhile."""
    with patch.dict(os.environ, dict.fromkeys(COMPILER_CACHES, folder)):
        yield

"""`scripts/benchmark coldstart`: from the start of `scripts/serve` until it is ready, and until its first answer.

With compilation and no cache, with the cache that this left, and without compilation. PyTorch's own caches in the file
system are empty each time: what is warm comes from the cache of the server alone.
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
                ("compiled, no cache", True),
                ("compiled, with its cache", True),
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
        compile_cache=cache if compiles else "",
        compile_lengths_in_s=f"{length_s:g}",
    )
    arguments = replace(run, settings=settings).serve_arguments
    with tempfile.TemporaryDirectory() as directory, empty_inductor_cache():
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
def empty_inductor_cache() -> Iterator[None]:
    """For the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in COMPILER_CACHES}
    with tempfile.TemporaryDirectory() as directory:
        os.environ.update(dict.fromkeys(COMPILER_CACHES, directory))
        try:
            yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value

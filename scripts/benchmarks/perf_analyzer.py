"""Triton's own load generator, from the wheel that still runs on this system's C library."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from benchmarks.measurement import Record, with_latencies

TIMEOUT_S: Final = 240.0
NS_PER_S: Final = 1_000_000_000
WHEEL: Final = "tritonclient==2.51.0"
MISSING_LIBRARIES: Final = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


@dataclass(frozen=True)
class Target:
    """A model on a server."""

    model: str
    protocol: str  # grpc or http
    address: str  # HOST:PORT
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """One request, in seconds on a clock of its own."""

    sent: float
    answered: float

    @property
    def latency(self) -> float:
        return self.answered - self.sent


def find_perf_analyzer(directory: Path) -> Path:
    """Returns the binary of this machine, as in Triton's SDK container; where there is none, installs one."""
    found = shutil.which("perf_analyzer")
    return Path(found) if found else install_perf_analyzer(directory)


def install_perf_analyzer(directory: Path) -> Path:
    """Returns the binary, in a folder apart: its client library must not replace the project's.

    It wants two libraries that it does not bring; copies lie in the wheel `nvidia-pytriton`.
    """
    binary = directory / "bin" / "perf_analyzer"
    if not binary.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={directory}", WHEEL]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    libraries = directory / "libraries"
    libraries.mkdir(exist_ok=True)
    spec = find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    for name, pattern in MISSING_LIBRARIES.items():
        found = sorted((Path(spec.origin).parent.parent / "nvidia_pytriton.libs").glob(pattern))
        if found and not (libraries / name).exists():
            (libraries / name).symlink_to(found[0])
    return binary


def write_input_data(path: Path, requests: Sequence[dict[str, Any]]) -> None:
    """The requests as perf_analyzer reads them: one element per input of a row."""
    data = [{name: {"content": [value], "shape": [1]} for name, value in request.items()} for request in requests]
    path.write_text(json.dumps({"data": data}))


def run_load(
    binary: Path,
    target: Target,
    input_data: Path,
    request_count: int,
    concurrency: int = 0,
    rate_per_s: float = 0,
    timeout_s: float = TIMEOUT_S,
) -> list[Answered]:
    """Sends `request_count` requests of `input_data` in turn: `concurrency` at a time, or at Poisson arrivals.

    Args:
        timeout_s: for all of them; has to exceed the slowest answer.

    Raises `RuntimeError` where a request failed, nothing was reported, or it does not end.
    """
    with tempfile.TemporaryDirectory() as directory:
        export = Path(directory) / "export.json"
        load = ["--concurrency-range", str(concurrency)]
        if rate_per_s:
            # Start and end: of a start below 1 alone it makes a range. Asynchronous: arrivals do not wait for answers.
            rates = f"{rate_per_s:g}:{rate_per_s:g}:1"
            load = ["--request-rate-range", rates, "--request-distribution", "poisson", "--async"]
        command = [
            *(str(binary), "-m", target.model, "-i", target.protocol, "-u", target.address, "-b", "1"),
            *("--input-data", str(input_data), *load),
            # One pass over a known number of requests, not windows until three of them agree.
            *("--request-count", str(request_count), "--percentile", "99"),
            *("--profile-export-file", str(export)),
            *(word for header in target.headers.items() for word in ("-H", ":".join(header))),
        ]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent.parent / "libraries")}
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # Seen at Poisson arrivals: every request was answered, and it waited for more.
            raise RuntimeError(f"perf_analyzer did not end within {timeout_s:g} s") from None
        if not export.exists():
            # What is wrong stands before the help.
            raise RuntimeError(f"perf_analyzer gave no report:\n{run.stdout[-2000:]}\n{run.stderr[:2000]}")
        answered = read_profile_export(export)
    if run.returncode or len(answered) < request_count:
        raise RuntimeError(
            f"perf_analyzer: got {len(answered)} answers but expected {request_count}:\n{run.stderr[:2000]}"
        )
    return answered


def read_profile_export(path: Path) -> list[Answered]:
    """The answered requests in the order they were sent; one without an answer is left out.

    Raises `ValueError` for a file with anything but one experiment.
    """
    experiments = json.loads(path.read_text())["experiments"]
    if len(experiments) != 1:
        raise ValueError(f"{path}: got {len(experiments)} experiments but expected 1")
    requests = [
        Answered(request["timestamp"] / NS_PER_S, request["response_timestamps"][-1] / NS_PER_S)
        for request in experiments[0]["requests"]
        if request["response_timestamps"]
    ]
    return sorted(requests, key=lambda request: request.sent)


def throughput(requests: Sequence[Answered]) -> float:
    """Answers per second, from the first that was sent to the last answer."""
    return len(requests) / _duration(requests)


def goodput(requests: Sequence[Answered], objective_s: float) -> float:
    """Answers within the objective per second of the same time; the late ones count for nothing."""
    return sum(request.latency <= objective_s for request in requests) / _duration(requests)


def with_answers(
    record: Record, answered: Sequence[Answered], objective_ms: float | None, rows: float | None
) -> Record:
    """`record` with latencies, throughput, UNet items of a forward, and goodput if there is an objective."""
    timed = replace(
        with_latencies(record, [request.latency for request in answered]), clips_per_s=throughput(answered), rows=rows
    )
    if objective_ms is None:
        return timed
    return replace(timed, objective_ms=objective_ms, goodput_per_s=goodput(answered, objective_ms / 1000))


def _duration(requests: Sequence[Answered]) -> float:
    if not requests:
        raise ValueError("requests: got none but expected at least one answer")
    return max(request.answered for request in requests) - min(request.sent for request in requests)

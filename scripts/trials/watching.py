"""What the processes of a server hold over time, and whether any of it grows."""

import json
import threading
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from serving.local_server import LocalServer
from serving.loopback import read_page
from serving.metrics import read_metrics
from serving.stage_processes import find_stages

INTERVAL_IN_S: Final = 1.0
# How far the memory may rise above its mean: by at most this share, and this much.
_MEMORY_SHARE: Final = 0.05
_MEMORY_BYTES: Final = 100 * 2**20
_SPREAD: Final = {"threads": 8, "handles": 16, "shared memory": 64 * 2**20}
"""How much more than in its first half a run may hold in its second: what differs with what is in flight."""


@dataclass(frozen=True)
class Sample:
    """What one process holds at one moment; for `shared memory`, the files of the whole server."""

    time_s: float
    process: str
    resident_bytes: int
    threads: int
    handles: int


@contextmanager
def watched(server: int) -> Iterator[list[Sample]]:
    """Samples the processes below `server` once a second, until the `with` block ends."""
    samples: list[Sample] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(INTERVAL_IN_S):
            samples.extend(_sample(server))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _sample(server: int) -> Iterator[Sample]:
    now = time.monotonic()
    stages = find_stages(server)
    parents = [process for process in psutil.Process(server).children() if process.name() == "tritonserver"]
    names = {**stages, **dict.fromkeys(parents, "tritonserver"), psutil.Process(server): "scripts/serve"}
    for process, name in names.items():
        try:
            yield Sample(now, name, process.memory_info().rss, process.num_threads(), process.num_fds())
        except psutil.NoSuchProcess:
            continue
    run = next((_run_of(parent) for parent in parents), "")
    files = [file.stat().st_size for file in Path("/dev/shm").glob(f"{run}*")] if run else []
    yield Sample(now, "shared memory", sum(files), 0, len(files))


def _run_of(triton: psutil.Process) -> str:
    """The name of a run's folder, with which its shared memory begins."""
    words = [word for word in triton.cmdline() if word.startswith("--model-repository=")]
    return Path(words[0].partition("=")[2]).parent.name if words else ""


def growth(samples: Sequence[Sample]) -> list[str]:
    """Returns what has grown in the second half of a run; nothing if all is flat."""
    found = []
    for process in sorted({sample.process for sample in samples}):
        own = [sample for sample in samples if sample.process == process]
        first, second = own[: len(own) // 2], own[len(own) // 2 :]
        if process == "shared memory":
            more = max(sample.resident_bytes for sample in second) - max(sample.resident_bytes for sample in first)
            if more > _SPREAD["shared memory"]:
                found.append(f"the shared memory has grown by {more / 2**20:.0f} MiB")
            continue
        resident = [sample.resident_bytes for sample in second]
        spread, mean = max(resident) - min(resident), sum(resident) / len(resident)
        if max(resident) - mean > min(_MEMORY_SHARE * mean, _MEMORY_BYTES):
            found.append(f"{process}: resident memory spreads by {spread / 2**20:.0f} of {mean / 2**20:.0f} MiB")
        for what in ("threads", "handles"):
            more = max(getattr(sample, what) for sample in second) - max(getattr(sample, what) for sample in first)
            if more > _SPREAD[what]:
                found.append(f"{process}: {more} more {what}")
    return found


def table(samples: Sequence[Sample]) -> list[str]:
    """Returns a line for each process: its memory, threads and handles in the second half of a run."""
    lines = []
    for process in sorted({sample.process for sample in samples}):
        own = [sample for sample in samples if sample.process == process]
        second = own[len(own) // 2 :]
        mebibytes = [sample.resident_bytes / 2**20 for sample in second]
        counts = f"threads {max(s.threads for s in second)}, handles {max(s.handles for s in second)}"
        lines.append(f"{process}: {min(mebibytes):.0f} to {max(mebibytes):.0f} MiB, {counts}")
    return lines


def left_behind(server: LocalServer, patience_in_s: float = 60.0) -> list[str]:
    """Returns what is still in the server after its last client has gone."""
    deadline = time.monotonic() + patience_in_s
    gauges = ("audioldm2_stage_requests", "audioldm2_rows_in_flight", "audioldm2_rows_waiting")
    while True:
        page = read_metrics(server.metrics_port)
        held = [f"{name} is {page[name]:g}" for name in gauges if page[name]]
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(0.2)


def left_in_memory(before: Set[Path]) -> list[str]:
    """Returns the new files in shared memory that belong to no server which runs, here or elsewhere."""
    running = {_run_of(process) for process in psutil.process_iter() if process.name() == "tritonserver"}
    new = sorted(set(Path("/dev/shm").glob("audioldm2-triton-*")) - before)
    return [f"{file} was left behind" for file in new if not any(run and file.name.startswith(run) for run in running)]


def restarts(server: LocalServer) -> int:
    """Returns how often the supervisor has replaced the server."""
    count: int = json.loads(read_page(server.health_port, "/live", 10))["restarts"]
    return count

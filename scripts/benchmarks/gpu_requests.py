"""Whole requests on a device, by the stages of this repository and by the reference pipeline."""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
import torch

from benchmarks.gpu_load import Loaded
from benchmarks.measurement import Record, read_records, with_latencies, with_times
from benchmarks.reference import run_pipeline, use_dpm_solver
from benchmarks.timing import peak_memory_mib, time_repeatedly
from benchmarks.workload import make_rows
from in_process.stages import Stages, running_stages
from project import ROOT
from stepping.forward_plan import Bucket

LONG_CLIP_CANDIDATES: Final = 3
LONG_CLIP_MEMORY_GIB: Final = 14.75
"""What PyTorch may hold on a GPU while the long clip is made: that of a card of 16 GB."""
STAGGERED_LOAD: Final = 0.8  # of the throughput that was measured in lock step


def alone(loaded: Loaded, record: Record) -> Record:
    """Measures one request, and the share of its text and its decoding."""
    stages, request, device = loaded.stages(), _request(loaded), loaded.run.device
    _count_forwards(stages)
    timed = _latencies(loaded, record, lambda: stages.generate(request), warm_up=2)
    used = _count_forwards(stages)
    resolved = stages.condition([request])[0]
    latents = stages.denoise([resolved])[0].numpy()
    text = time_repeatedly(lambda: stages.condition([request]), loaded.plan.repeats, device)
    decoding = time_repeatedly(lambda: stages.decode([{**resolved, "latents": latents}]), loaded.plan.repeats, device)
    parts = f"text {1000 * statistics.median(text):.1f} ms, decoding {1000 * statistics.median(decoding):.1f} ms"
    return replace(timed, note=f"{parts}; {used}")


def throughput(loaded: Loaded, record: Record) -> Record:
    """Measures a closed loop: each client sends its next request when it has the answer to the last."""
    clients = record.concurrency or 1
    return _under_load(loaded, record, clients, lambda _: 0.0)


def staggered(loaded: Loaded, record: Record) -> Record:
    """Measures Poisson arrivals, where requests enter and leave at every step."""
    best = max(
        (record.clips_per_s or 0 for record in read_records(loaded.run.csv) if "lock step" in record.path), default=0
    )
    if not best:
        raise RuntimeError("got no throughput in lock step but expected one, which sets the rate")
    rate, generator = STAGGERED_LOAD * best, random.Random(0)
    arrivals = np.cumsum([generator.expovariate(rate) for _ in range(1000)])
    timed = _under_load(loaded, record, max(loaded.plan.concurrencies), lambda index: float(arrivals[index]))
    return replace(timed, rate_per_s=rate)


def _under_load(loaded: Loaded, record: Record, clients: int, arrival: Callable[[int], float]) -> Record:
    stages = loaded.stages()
    requests = make_rows(clients * loaded.plan.requests_in_flight_times, loaded.plan.length_s, loaded.plan.steps)

    def timed(index: int, start: float) -> float:
        due = start + arrival(index)
        time.sleep(max(0.0, due - time.perf_counter()))
        begun = due if arrival(index) else time.perf_counter()
        stages.generate(requests[index])
        return time.perf_counter() - begun

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(stages.generate, requests[:clients]))  # warms up
        stages.step_times.clear()
        _count_forwards(stages)
        start = time.perf_counter()
        seconds = list(pool.map(lambda index: timed(index, start), range(len(requests))))
        duration = time.perf_counter() - start
    return replace(
        with_latencies(record, seconds),
        clips_per_s=len(requests) / duration,
        peak_memory_mib=peak_memory_mib(loaded.run.device),
        note=f"{stages.step_times.rows_per_forward or 0:.1f} rows per forward; {_count_forwards(stages)}",
    )


def _count_forwards(stages: Stages) -> str:
    """Returns how often each bucket has run since the last call."""
    counted: Counter[Bucket | None] = Counter()
    for unet in stages.unets:
        counted.update(unet.forwards)
        unet.forwards.clear()
    eager = counted.pop(None, 0)
    buckets = sorted((bucket.items, bucket.masked, count) for bucket, count in counted.items() if bucket)
    used = ", ".join(f"{count} of {items}{' masked' if masked else ''}" for items, masked, count in buckets)
    return f"forwards in buckets: {used or 'none'}; eager: {eager}"


def twenty_steps(loaded: Loaded, record: Record, compiled: bool) -> Record:
    pipeline = loaded.pipeline(loaded.run.dtype, compiled)
    use_dpm_solver(pipeline)
    timed = _latencies(loaded, record, lambda: run_pipeline(pipeline, _request(loaded)), warm_up=3 if compiled else 1)
    return replace(timed, clips_per_s=1000 / (timed.median_ms or float("nan")))


def as_it_comes(loaded: Loaded, record: Record) -> Record:
    pipeline = loaded.pipeline(torch.float32, compiled=False)
    seconds = time_repeatedly(
        lambda: run_pipeline(pipeline, _request(loaded), loaded.plan.own_steps), 2, loaded.run.device, warm_up=0
    )
    return with_latencies(record, seconds)


def _latencies(loaded: Loaded, record: Record, work: Callable[[], object], warm_up: int) -> Record:
    seconds = time_repeatedly(work, loaded.plan.repeats, loaded.run.device, warm_up)
    return replace(with_latencies(record, seconds), peak_memory_mib=peak_memory_mib(loaded.run.device))


def start_stages(loaded: Loaded, record: Record) -> Record:
    """Measures in a separate process, without compiled code left from another."""
    loaded.drop()
    command = [sys.executable, "-m", "benchmarks.stage_start", json.dumps(asdict(loaded.run.settings))]
    command.append(f"--audio-length-in-s={loaded.plan.length_s}")
    with tempfile.TemporaryDirectory() as inductor:
        paths = os.pathsep.join([str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
        caches = {"TORCHINDUCTOR_CACHE_DIR": inductor, "TRITON_CACHE_DIR": inductor}
        environment = {**os.environ, **caches, "PYTHONPATH": paths}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the stages did not start: {run.stderr[-200:]}")
    times = json.loads(run.stdout.splitlines()[-1])
    return replace(with_times(record, [times["ready_s"]]), note=f"first answer {times['first_s']:.2f} s after that")


def long_clip(loaded: Loaded, record: Record) -> Record:
    """Measures the guide's last case: five minutes of audio on a small GPU."""
    loaded.drop()
    settings = replace(loaded.run.settings, offload="on", compile="off")
    (request,) = make_rows(1, loaded.plan.long_s, loaded.plan.steps)
    request = replace(request, num_waveforms_per_prompt=LONG_CLIP_CANDIDATES)
    device = loaded.run.device
    with at_most(device, LONG_CLIP_MEMORY_GIB), running_stages(settings) as stages:
        seconds = time_repeatedly(lambda: stages.generate(request), 1, device, warm_up=0)
    note = f"capped at {LONG_CLIP_MEMORY_GIB} GiB" if device.type == "cuda" else ""
    return replace(with_latencies(record, seconds), peak_memory_mib=peak_memory_mib(device), note=note)


@contextmanager
def at_most(device: torch.device, gib: float) -> Iterator[None]:
    """Bounds what PyTorch may hold on a GPU."""
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _request(loaded: Loaded) -> Any:
    return make_rows(1, loaded.plan.length_s, loaded.plan.steps)[0]

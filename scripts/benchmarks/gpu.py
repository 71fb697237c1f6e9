"""`scripts/benchmark gpu`: what a machine with a GPU should measure, without a server, in calls of a few minutes.

Each measurement is written down when it is done, and is not done again by the next call with the same `--csv`; a
call that has used up its time stops and says how many are left. The weights are random and made here: their cost is
that of trained ones.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch

from audioldm2_triton.geometry import AudioGeometry, read_audio_geometry
from benchmarks.flops import peak_gflop_per_s, unet_gflop
from benchmarks.in_process import Stages, running_stages, step_seconds
from benchmarks.measurement import Row, is_measured, print_table, read_rows, with_latencies, with_times
from benchmarks.reference import load_pipeline, run_pipeline, use_dpm_solver
from benchmarks.setting import CACHE, ROOT, Setting, add_common_arguments, read_setting
from benchmarks.timing import free_memory, peak_memory_mib, time_repeatedly
from benchmarks.workload import make_rows

WARM_UP_REQUESTS: Final = 2
LONG_CLIP_CANDIDATES: Final = 3
LONG_CLIP_MEMORY_GIB: Final = 14.75
"""What PyTorch may hold on a GPU while the long clip is made: that of a card of 16 GB."""


class BudgetSpentError(BaseException):
    """The time of this call is used up. No `Exception`: whatever runs at that moment must not take it for a failure."""


@dataclass(frozen=True)
class Plan:
    """How much is measured; a tiny checkpoint is for trying the command out."""

    length_s: float
    long_s: float  # of the long clip
    steps: int
    own_steps: int
    repeats: int
    concurrencies: tuple[int, ...]
    rows: tuple[int, ...]
    requests_in_flight_times: int  # requests per concurrency, in multiples of it


@dataclass
class Loaded:
    """What is on the device at the moment: the pipeline or the stages, loaded when first asked for."""

    setting: Setting
    geometry: AudioGeometry
    plan: Plan
    name: str = ""
    held: Any = None
    closing: ExitStack = field(default_factory=ExitStack)

    def pipeline(self, dtype: torch.dtype, compiled: bool) -> Any:
        return self._hold(
            f"pipeline {dtype} {compiled}",
            lambda: load_pipeline(self.setting.checkpoint, self.setting.device, dtype, compiled),
        )

    def stages(self) -> Stages:
        def load() -> Stages:
            stages = Stages(self.setting.settings)
            self.closing.callback(stages.close)
            return stages

        held: Stages = self._hold("stages", load)
        return held

    def drop(self) -> None:
        self.closing.close()
        self.name, self.held = "", None
        free_memory(self.setting.device)

    def _hold(self, name: str, load: Callable[[], Any]) -> Any:
        if name != self.name:
            self.drop()
            self.held = load()
            self.name = name
        return self.held


@dataclass(frozen=True)
class Measurement:
    row: Row  # what identifies it
    run: Callable[[Loaded, Row], Row]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "gpu")
    parser.set_defaults(checkpoint=None)
    parser.add_argument("--size", choices=("tiny", "base", "large"), default="base", help="of the weights to make")
    parser.add_argument("--budget-s", type=float, default=500, help="of this call (default: %(default)s)")
    parser.add_argument("--audio-length-in-s", type=float, help="default: the native length; 0.64 with --size tiny")


def measure(arguments: argparse.Namespace) -> None:
    with budget(arguments.budget_s):
        # Compiled code of a call that was cut short is found again by the next one.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
        arguments.checkpoint = arguments.checkpoint or CACHE / "checkpoints" / arguments.size
        arguments.compile_cache = arguments.compile_cache or str(CACHE / "compiled")
        finished = True
        try:
            setting = read_setting(arguments, "gpu")
            geometry = read_audio_geometry(setting.checkpoint)
            finished = measure_all(setting, geometry, make_plan(arguments, geometry))
        except BudgetSpentError:
            finished = False
    print_table([row for row in read_rows(arguments.csv) if row.what == "gpu"], sys.stdout)
    print("all measured" if finished else "the time of this call is used up: call again to go on")
    sys.stdout.flush()
    # Threads that compile or step cannot be interrupted, and must not hold up the end.
    os._exit(0)


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raises `BudgetSpentError` in the main thread after so many seconds."""

    def stop(*_: object) -> None:
        raise BudgetSpentError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_plan(arguments: argparse.Namespace, geometry: AudioGeometry) -> Plan:
    if arguments.size == "tiny":
        return Plan(arguments.audio_length_in_s or 0.64, 3.0, 3, 6, 2, (1, 2), (2, 4), 2)
    length_s = arguments.audio_length_in_s or geometry.native_audio_length_in_s
    return Plan(length_s, 300.0, 20, 200, 5, (1, 2, 4, 8, 16, 24, 32, 48), (2, 4, 8, 16, 24, 32, 48, 62), 3)


def measure_all(setting: Setting, geometry: AudioGeometry, plan: Plan) -> bool:
    """Does what the CSV does not have yet, in order; whether everything is there now."""
    done = read_rows(setting.csv)
    left = [measurement for measurement in list_measurements(setting, plan) if not is_measured(done, measurement.row)]
    loaded = Loaded(setting, geometry, plan)
    for number, measurement in enumerate(left, start=1):
        row = measurement.row
        load = "".join(
            f", {name} {value}" for name, value in (("rows", row.rows), ("requests", row.concurrency)) if value
        )
        print(f"{number} of {len(left)}: {row.path}{load}", file=sys.stderr, flush=True)
        try:
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(setting.device)
            setting.keep(measurement.run(loaded, row))
        except Exception as error:
            # What does not fit or does not compile here is a result too, and must not keep the rest from being done.
            setting.keep(replace(row, note=f"failed: {type(error).__name__}: {str(error)[:200]}"))
            loaded.drop()
    loaded.drop()
    return True


def list_measurements(setting: Setting, plan: Plan) -> list[Measurement]:
    """What costs least to start comes first; what shares a load comes together."""
    base = replace(setting.row, length_s=plan.length_s, steps=plan.steps, guidance=3.5)
    compiled = "compiled" if setting.compiles else "not compiled"
    alone = replace(base, concurrency=1)
    return [
        Measurement(replace(base, path="large product of matrices", length_s=None, steps=None, guidance=None), _peak),
        Measurement(replace(alone, path="pipeline as it comes", dtype="float32", steps=plan.own_steps), _as_it_comes),
        Measurement(replace(alone, path="pipeline, one by one, not compiled"), _one_by_one),
        Measurement(replace(alone, path=f"guide's recipe, UNet {compiled}"), _recipe),
        Measurement(replace(alone, path=f"engine, {compiled}, alone"), _alone),
        *(
            Measurement(replace(base, path=f"engine, {compiled}", concurrency=concurrency), _throughput)
            for concurrency in plan.concurrencies
        ),
        *(Measurement(replace(base, path=f"engine, {compiled}, step", rows=float(rows)), _step) for rows in plan.rows),
        *_starts(setting, replace(base, steps=2)),
        Measurement(
            replace(alone, path=f"{LONG_CLIP_CANDIDATES} candidates of a long clip, offload", length_s=plan.long_s),
            _long_clip,
        ),
    ]


def _starts(setting: Setting, base: Row) -> list[Measurement]:
    if not setting.compiles:
        return [Measurement(replace(base, path="start of the stages, not compiled"), _cold_start)]
    return [
        Measurement(replace(base, path="start of the stages, compiled, with their cache"), _warm_start),
        Measurement(replace(base, path="start of the stages, compiled, no cache"), _cold_start),
    ]


def _peak(loaded: Loaded, row: Row) -> Row:
    peak = peak_gflop_per_s(loaded.setting.device, loaded.setting.dtype)
    return replace(row, roofline_share=1.0, note=f"{peak:.1f} GFLOP/s")


def _as_it_comes(loaded: Loaded, row: Row) -> Row:
    pipeline = loaded.pipeline(torch.float32, compiled=False)
    return _latencies(loaded, row, lambda: run_pipeline(pipeline, _request(loaded), loaded.plan.own_steps), warm_up=1)


def _one_by_one(loaded: Loaded, row: Row) -> Row:
    return _dpm(loaded, row, compiled=False)


def _recipe(loaded: Loaded, row: Row) -> Row:
    return _dpm(loaded, row, compiled=loaded.setting.compiles)


def _dpm(loaded: Loaded, row: Row, compiled: bool) -> Row:
    pipeline = loaded.pipeline(loaded.setting.dtype, compiled)
    use_dpm_solver(pipeline)
    timed = _latencies(loaded, row, lambda: run_pipeline(pipeline, _request(loaded)), warm_up=3 if compiled else 1)
    return replace(timed, clips_per_s=1000 / (timed.median_ms or float("nan")))


def _alone(loaded: Loaded, row: Row) -> Row:
    stages = loaded.stages()
    return _latencies(loaded, row, lambda: stages.generate(_request(loaded)), warm_up=WARM_UP_REQUESTS)


def _latencies(loaded: Loaded, row: Row, work: Callable[[], object], warm_up: int) -> Row:
    seconds = time_repeatedly(work, loaded.plan.repeats, loaded.setting.device, warm_up)
    return replace(with_latencies(row, seconds), peak_memory_mib=peak_memory_mib(loaded.setting.device))


def _throughput(loaded: Loaded, row: Row) -> Row:
    """Each of so many clients sends its next request when it has the answer to the last."""
    stages, clients = loaded.stages(), row.concurrency or 1
    requests = make_rows(clients * loaded.plan.requests_in_flight_times, loaded.plan.length_s, loaded.plan.steps)

    def timed(index: int) -> float:
        start = time.perf_counter()
        stages.generate(requests[index])
        return time.perf_counter() - start

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(timed, range(min(clients, len(requests)))))  # warms up
        stages.step_times.clear()
        start = time.perf_counter()
        seconds = list(pool.map(timed, range(len(requests))))
        duration = time.perf_counter() - start
    return replace(
        with_latencies(row, seconds),
        clips_per_s=len(requests) / duration,
        peak_memory_mib=peak_memory_mib(loaded.setting.device),
        note=f"{stages.step_times.rows_per_forward or 0:.1f} rows per forward",
    )


def _step(loaded: Loaded, row: Row) -> Row:
    stages, rows = loaded.stages(), int(row.rows or 0)
    seconds = step_seconds(stages, rows, _request(loaded), loaded.plan.repeats)
    geometry = loaded.geometry
    frames = geometry.latent_frames(loaded.plan.length_s)
    gflop = unet_gflop(loaded.setting.checkpoint, rows, frames, geometry.latent_width)
    peak = peak_gflop_per_s(loaded.setting.device, loaded.setting.dtype)
    return replace(
        with_times(row, [seconds]),
        samples=loaded.plan.repeats * loaded.plan.steps,
        gflop=gflop,
        roofline_share=gflop / seconds / peak,
        peak_memory_mib=peak_memory_mib(loaded.setting.device),
    )


def _warm_start(loaded: Loaded, row: Row) -> Row:
    loaded.stages()  # leaves its compiled code behind, if nothing has yet
    loaded.drop()
    return _start(loaded, row, str(loaded.setting.settings.compile_cache))


def _cold_start(loaded: Loaded, row: Row) -> Row:
    loaded.drop()
    with tempfile.TemporaryDirectory() as cache:
        return _start(loaded, row, cache)


def _start(loaded: Loaded, row: Row, compile_cache: str) -> Row:
    """In a process of its own, whose only warm cache is the stages'."""
    settings = replace(loaded.setting.settings, compile_cache=compile_cache)
    command = [sys.executable, "-m", "benchmarks.stage_start", json.dumps(asdict(settings))]
    command.append(f"--audio-length-in-s={loaded.plan.length_s}")
    with tempfile.TemporaryDirectory() as inductor:
        paths = os.pathsep.join([str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
        caches = {"TORCHINDUCTOR_CACHE_DIR": inductor, "TRITON_CACHE_DIR": inductor}
        environment = {**os.environ, **caches, "PYTHONPATH": paths}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the stages did not start: {run.stderr[-200:]}")
    times = json.loads(run.stdout.splitlines()[-1])
    return replace(with_times(row, [times["ready_s"]]), note=f"first answer {times['first_s']:.2f} s after that")


def _long_clip(loaded: Loaded, row: Row) -> Row:
    """The guide's last case: five minutes on a small GPU."""
    loaded.drop()
    settings = replace(loaded.setting.settings, offload="on", compile="off")
    (request,) = make_rows(1, loaded.plan.long_s, loaded.plan.steps)
    request = replace(request, num_waveforms_per_prompt=LONG_CLIP_CANDIDATES)
    device = loaded.setting.device
    with at_most(device, LONG_CLIP_MEMORY_GIB), running_stages(settings) as stages:
        seconds = time_repeatedly(lambda: stages.generate(request), 1, device, warm_up=0)
    note = f"capped at {LONG_CLIP_MEMORY_GIB} GiB" if device.type == "cuda" else ""
    return replace(with_latencies(row, seconds), peak_memory_mib=peak_memory_mib(device), note=note)


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

"""`scripts/benchmark gpu`: what a machine with a GPU should measure, without a server, in calls of a few minutes.

What matters most comes first. Each measurement is written down when it is done, and is not done again by the next call
with the same `--csv`; a call whose time is used up prints what it has and ends. The weights are random and made here:
their cost is that of trained ones. What fails is recorded too, tried again by the next call, and makes this one fail.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from audioldm2_triton.server.geometry import AudioGeometry, read_audio_geometry
from benchmarks.flops import peak_gflop_per_s, unet_gflop
from benchmarks.measurement import Record, is_measured, print_table, read_records, with_latencies, with_times
from benchmarks.reference import load_pipeline, run_pipeline, use_dpm_solver
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.timing import free_memory, peak_memory_mib, synchronise, time_repeatedly
from benchmarks.workload import make_rows
from in_process.stages import Stages, running_stages
from project import CACHE, ROOT
from stepping.denoising_unet import DenoisingUNet, load_unet
from stepping.forward_plan import Bucket

LONG_CLIP_CANDIDATES: Final = 3
LONG_CLIP_MEMORY_GIB: Final = 14.75
"""What PyTorch may hold on a GPU while the long clip is made: that of a card of 16 GB."""
STAGGERED_LOAD: Final = 0.8  # of the throughput that was measured in lock step
BACKENDS: Final = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
FAILED: Final = "failed: "


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
    compiled_rows: tuple[int, ...]
    requests_in_flight_times: int  # requests per concurrency, in multiples of it


@dataclass
class Loaded:
    """What is on the device at the moment: loaded when first asked for, dropped when something else is."""

    run: Run
    geometry: AudioGeometry
    plan: Plan
    name: str = ""
    held: Any = None
    closing: ExitStack = field(default_factory=ExitStack)

    def pipeline(self, dtype: torch.dtype, compiled: bool) -> Any:
        return self._hold(
            f"pipeline {dtype} {compiled}",
            lambda: load_pipeline(self.run.checkpoint, self.run.device, dtype, compiled),
        )

    def stages(self) -> Stages:
        def load() -> Stages:
            stages = Stages(self.run.settings)
            self.closing.callback(stages.close)
            return stages

        held: Stages = self._hold("stages", load)
        return held

    def unet(self, buckets: Sequence[Bucket], use_compiler: bool) -> DenoisingUNet:
        run = self.run
        load = partial(load_unet, run.checkpoint, self.geometry.latent_width, run.device, run.dtype)
        held: DenoisingUNet = self._hold(f"unet {buckets} {use_compiler}", lambda: load(buckets, use_compiler))
        return held

    def drop(self) -> None:
        self.closing.close()
        self.name, self.held = "", None
        free_memory(self.run.device)

    def _hold(self, name: str, load: Callable[[], Any]) -> Any:
        if name != self.name:
            self.drop()
            self.held = load()
            self.name = name
        return self.held


@dataclass(frozen=True)
class Measurement:
    record: Record  # what identifies it
    run: Callable[[Loaded, Record], Record]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "gpu")
    parser.set_defaults(checkpoint=None)
    parser.add_argument("--size", choices=("tiny", "base", "large"), default="base", help="of the weights to make")
    parser.add_argument("--budget-s", type=float, default=500, help="of this call (default: %(default)s)")
    parser.add_argument("--audio-length-in-s", type=float, help="default: the native length; 0.64 with --size tiny")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="measurements whose name has one of these"
    )


def measure(arguments: argparse.Namespace) -> None:
    end_after(arguments.budget_s, arguments)
    # Compiled code of a call that was cut short is found again by the next one.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
    arguments.checkpoint = arguments.checkpoint or CACHE / "checkpoints" / arguments.size
    run = read_run(arguments, "gpu")
    geometry = read_audio_geometry(run.checkpoint)
    failures = measure_all(run, geometry, make_plan(arguments, geometry), arguments.only)
    report(arguments, "all measured" if not failures else f"{failures} failed")
    # Threads that compile or step cannot be interrupted, and must not hold up the end.
    os._exit(1 if failures else 0)


def end_after(seconds: float, arguments: argparse.Namespace) -> None:
    """Ends the process when its time is used up, whatever runs at that moment."""

    def end() -> None:
        report(arguments, "the time of this call is used up: call again to go on")
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def report(arguments: argparse.Namespace, outcome: str) -> None:
    print_table([record for record in read_records(arguments.csv) if record.what == "gpu"], sys.stdout)
    print(outcome, flush=True)


def make_plan(arguments: argparse.Namespace, geometry: AudioGeometry) -> Plan:
    if arguments.size == "tiny":
        return Plan(arguments.audio_length_in_s or 0.64, 3.0, 3, 6, 2, (1, 2), (2, 4), (2,), 2)
    length_s = arguments.audio_length_in_s or geometry.native_audio_length_in_s
    return Plan(length_s, 300.0, 20, 200, 5, (1, 8, 31), (2, 8, 16, 32, 62), (2, 32), 3)


def measure_all(run: Run, geometry: AudioGeometry, plan: Plan, only: Sequence[str] = ()) -> int:
    """Does what the CSV does not have yet, in order; returns how many failed."""
    done = [record for record in read_records(run.csv) if not record.note.startswith(FAILED)]
    left = [
        measurement
        for measurement in list_measurements(run, plan)
        if not is_measured(done, measurement.record)
        and (not only or any(text in measurement.record.path for text in only))
    ]
    loaded, failures = Loaded(run, geometry, plan), 0
    for number, measurement in enumerate(left, start=1):
        record = measurement.record
        load = "".join(
            f", {name} {value}" for name, value in (("rows", record.rows), ("requests", record.concurrency)) if value
        )
        print(f"{number} of {len(left)}: {record.path}{load}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            kept = run.keep(measurement.run(loaded, record))
            print(
                f"  {time.perf_counter() - start:.1f} s: {kept.median_ms} ms {kept.note}", file=sys.stderr, flush=True
            )
        except Exception as error:
            # What does not fit or does not compile here must not keep the rest from being done.
            failures += 1
            note = f"{FAILED}{type(error).__name__}: {str(error)[:300]}"
            print(f"  {note}", file=sys.stderr, flush=True)
            run.keep(replace(record, note=note))
            del error
            gc.collect()
            loaded.drop()
    loaded.drop()
    return failures


def list_measurements(run: Run, plan: Plan) -> list[Measurement]:
    """What matters most comes first; what shares a load comes together."""
    base = replace(run.record, length_s=plan.length_s, steps=plan.steps, guidance=3.5)
    plain = replace(base, length_s=None, steps=None, guidance=None)
    alone = replace(base, concurrency=1)
    on_gpu = run.device.type == "cuda"
    fixed = "graphs" if on_gpu else "eager"
    measurements = [
        Measurement(replace(plain, path="large product of matrices"), _peak),
        Measurement(replace(base, path=f"UNet, {fixed}, against float32", steps=None), _parity),
        *(Measurement(replace(base, path="step, eager", rows=float(rows)), _step) for rows in plan.rows),
    ]
    if on_gpu:
        graphs = partial(_fixed_step, use_compiler=False)
        measurements += [
            *(Measurement(replace(base, path="step, graphs", rows=float(rows)), graphs) for rows in plan.rows),
            *(
                Measurement(replace(base, path="kernels of an eager step", rows=float(rows)), _kernels)
                for rows in plan.compiled_rows
            ),
            *(Measurement(replace(plain, path="attention", rows=float(rows)), _attention) for rows in (2, 32)),
        ]
    compiled_step = partial(_fixed_step, use_compiler=True)
    measurements += [
        Measurement(replace(alone, path=f"stages, {fixed}, alone"), _alone),
        *(
            Measurement(replace(base, path=f"stages, {fixed}, lock step", concurrency=concurrency), _throughput)
            for concurrency in plan.concurrencies
        ),
        Measurement(replace(base, path=f"stages, {fixed}, staggered"), _staggered),
        Measurement(replace(alone, path="pipeline, one by one, eager"), partial(_dpm, compiled=False)),
    ]
    measurements += [
        Measurement(
            replace(alone, path=f"{LONG_CLIP_CANDIDATES} candidates of a long clip, offload", length_s=plan.long_s),
            _long_clip,
        ),
        Measurement(replace(base, path=f"start of the stages, {fixed}", steps=2), _start),
        Measurement(replace(alone, path="pipeline as it comes", dtype="float32", steps=plan.own_steps), _as_it_comes),
    ]
    if run.settings.compile == "off":
        return measurements
    # Compilers take minutes.
    recipe = Measurement(replace(alone, path="guide's recipe, UNet compiled"), partial(_dpm, compiled=True))
    steps = [replace(base, path="step, compiled", rows=float(rows)) for rows in plan.compiled_rows]
    return [*measurements, recipe, *(Measurement(record, compiled_step) for record in steps)]


def _peak(loaded: Loaded, record: Record) -> Record:
    peak = peak_gflop_per_s(loaded.run.device, loaded.run.dtype)
    return replace(record, roofline_share=1.0, note=f"{peak:.1f} GFLOP/s")


@torch.inference_mode()
def _parity(loaded: Loaded, record: Record) -> Record:
    """One forward of the served UNet, and of the reference in the same dtype, against the reference in float32."""
    run, frames = loaded.run, loaded.geometry.latent_frames(loaded.plan.length_s)
    config = json.loads((run.checkpoint / "unet" / "config.json").read_text())
    generated_dim, prompt_dim = [dim for dim in config["cross_attention_dim"][0] if dim is not None]
    generator = torch.Generator().manual_seed(0)

    def random_numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(run.device)

    sample = random_numbers(2, config["in_channels"], frames, loaded.geometry.latent_width)
    timesteps = torch.tensor([941.0, 300.0], device=run.device)
    texts = random_numbers(2, 8, generated_dim), random_numbers(2, 16, prompt_dim)
    mask = torch.ones(2, 16, device=run.device)

    def reference(dtype: torch.dtype) -> torch.Tensor:
        unet = AudioLDM2UNet2DConditionModel.from_pretrained(run.checkpoint / "unet", torch_dtype=dtype)
        unet = unet.to(run.device).eval()
        output = unet(
            *(sample.to(dtype), timesteps, texts[0].to(dtype)),
            encoder_hidden_states_1=texts[1].to(dtype),
            encoder_attention_mask_1=mask.to(dtype),
        )
        return output.sample.float()

    exact = reference(torch.float32)
    same = reference(run.dtype)
    lean = loaded.unet((), False).module
    own = lean(
        sample.to(run.dtype),
        lean.time_biases(timesteps),
        lean.text_keys(texts[0].to(run.dtype), texts[1].to(run.dtype), mask),
        None,
    ).float()

    def apart(output: torch.Tensor) -> float:
        return float((output - exact).norm() / exact.norm())

    if not apart(own) <= 2 * apart(same) + 1e-5:
        raise RuntimeError(f"got {apart(own):.2g} from float32 but expected about the reference's {apart(same):.2g}")
    return replace(record, note=f"{apart(own):.2g} from float32; the reference in this dtype {apart(same):.2g}")


def _step(loaded: Loaded, record: Record) -> Record:
    return _timed_step(loaded, record, loaded.unet((), False), None)


def _fixed_step(loaded: Loaded, record: Record, use_compiler: bool) -> Record:
    frames = loaded.geometry.latent_frames(loaded.plan.length_s)
    bucket = Bucket(int(record.rows or 0), frames, masked=False)
    loaded.drop()  # a bucket's peak is to be its own
    start = time.perf_counter()
    unet = loaded.unet((bucket,), use_compiler)
    inputs = unet.random_inputs(bucket.items, bucket.frames, masked=False)
    with torch.inference_mode():
        unet.denoise(inputs, bucket)
        synchronise(loaded.run.device)
        ready_s = time.perf_counter() - start
        fixed, eager = unet.denoise(inputs, bucket), unet.denoise(inputs, None)
    apart = float((fixed - eager).norm() / eager.norm())
    if not apart < 0.01:
        raise RuntimeError(f"got {apart:.2g} from the eager step but expected the same")
    timed = _timed_step(loaded, record, unet, bucket)
    return replace(timed, note=f"ready in {ready_s:.1f} s, {apart:.1g} from eager")


@torch.inference_mode()
def _timed_step(loaded: Loaded, record: Record, unet: DenoisingUNet, bucket: Bucket | None) -> Record:
    run, rows = loaded.run, int(record.rows or 0)
    frames = loaded.geometry.latent_frames(loaded.plan.length_s)
    inputs = unet.random_inputs(rows, frames, masked=False)
    steps = loaded.plan.steps

    def take_steps() -> None:
        # As the engine: each step reads what the last has made.
        step = inputs
        for _ in range(steps):
            step = replace(step, history=unet.denoise(step, bucket))

    take_steps()
    synchronise(run.device)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = statistics.median(time_repeatedly(take_steps, loaded.plan.repeats, run.device)) / steps
    gflop = unet_gflop(run.checkpoint, rows, frames, loaded.geometry.latent_width)
    return replace(
        with_times(record, [seconds]),
        samples=loaded.plan.repeats * steps,
        gflop=gflop,
        roofline_share=gflop / seconds / peak_gflop_per_s(run.device, run.dtype),
        peak_memory_mib=peak_memory_mib(run.device),
    )


@torch.inference_mode()
def _kernels(loaded: Loaded, record: Record) -> Record:
    """Where the time of a step goes."""
    unet = loaded.unet((), False)
    inputs = unet.random_inputs(
        int(record.rows or 0), loaded.geometry.latent_frames(loaded.plan.length_s), masked=False
    )
    unet.denoise(inputs, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        unet.denoise(inputs, None)
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.self_device_time_total]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    shares = [f"{event.self_device_time_total / total:.0%} {event.count} x {event.key[:60]}" for event in kernels[:16]]
    launched = sum(event.count for event in kernels)
    return replace(with_times(record, [total / 1e6]), note=f"{launched} kernels: " + "; ".join(shares))


def _attention(loaded: Loaded, record: Record) -> Record:
    """Self-attention of every level by every kernel, in microseconds."""
    run = loaded.run
    config = json.loads((run.checkpoint / "unet" / "config.json").read_text())
    heads = config["num_attention_heads"] or config["attention_head_dim"]
    notes = []
    for level, channels in enumerate(config["block_out_channels"]):
        own_heads = heads[level] if isinstance(heads, list) else heads
        frames = loaded.geometry.latent_frames(loaded.plan.length_s)
        positions = (frames >> level) * max(1, loaded.geometry.latent_width >> level)
        shape = (int(record.rows or 0), own_heads, positions, channels // own_heads)
        query, key, value = (torch.randn(shape, device=run.device, dtype=run.dtype) for _ in range(3))
        times = []
        for backend in BACKENDS:
            try:
                with sdpa_kernel(backend):
                    attend = partial(scaled_dot_product_attention, query, key, value)
                    times.append(f"{backend.name.split('_')[0].lower()} {1e6 * _kernel_seconds(attend):.0f}")
            except RuntimeError:
                times.append(f"{backend.name.split('_')[0].lower()} none")
        notes.append(f"{positions} x {channels // own_heads}: {', '.join(times)}")
    return replace(record, note="; ".join(notes))


def _kernel_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    work()
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000 / repeats


def _alone(loaded: Loaded, record: Record) -> Record:
    """One request, and what its text and its decoding take of it."""
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


def _throughput(loaded: Loaded, record: Record) -> Record:
    """Each of so many clients sends its next request when it has the answer to the last."""
    clients = record.concurrency or 1
    return _under_load(loaded, record, clients, lambda _: 0.0)


def _staggered(loaded: Loaded, record: Record) -> Record:
    """Poisson arrivals, so that requests enter and leave at every step."""
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
    """What has run in which bucket since the last call."""
    counted: Counter[Bucket | None] = Counter()
    for unet in stages.unets:
        counted.update(unet.forwards)
        unet.forwards.clear()
    eager = counted.pop(None, 0)
    buckets = sorted((bucket.items, bucket.masked, count) for bucket, count in counted.items() if bucket)
    used = ", ".join(f"{count} of {items}{' masked' if masked else ''}" for items, masked, count in buckets)
    return f"forwards in buckets: {used or 'none'}; eager: {eager}"


def _dpm(loaded: Loaded, record: Record, compiled: bool) -> Record:
    pipeline = loaded.pipeline(loaded.run.dtype, compiled)
    use_dpm_solver(pipeline)
    timed = _latencies(loaded, record, lambda: run_pipeline(pipeline, _request(loaded)), warm_up=3 if compiled else 1)
    return replace(timed, clips_per_s=1000 / (timed.median_ms or float("nan")))


def _as_it_comes(loaded: Loaded, record: Record) -> Record:
    pipeline = loaded.pipeline(torch.float32, compiled=False)
    seconds = time_repeatedly(
        lambda: run_pipeline(pipeline, _request(loaded), loaded.plan.own_steps), 2, loaded.run.device, warm_up=0
    )
    return with_latencies(record, seconds)


def _latencies(loaded: Loaded, record: Record, work: Callable[[], object], warm_up: int) -> Record:
    seconds = time_repeatedly(work, loaded.plan.repeats, loaded.run.device, warm_up)
    return replace(with_latencies(record, seconds), peak_memory_mib=peak_memory_mib(loaded.run.device))


def _start(loaded: Loaded, record: Record) -> Record:
    """In a process of its own, with no compiled code left from another."""
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


def _long_clip(loaded: Loaded, record: Record) -> Record:
    """The guide's last case: five minutes on a small GPU."""
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

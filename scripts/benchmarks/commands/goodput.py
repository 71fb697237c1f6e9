"""`scripts/benchmark goodput`: requests that differ in everything, over multiples of the capacity, four ways in turns.

All ways are servers that run side by side and get the same requests at the same times, one way after the other. A
request is good if it is answered within three times the time that it takes alone, on the engine.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from math import inf, nan
from pathlib import Path
from typing import Any, Final

import numpy as np
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from audioldm2_triton.contract import BATCH, ENSEMBLE, INTERACTIVE
from audioldm2_triton.server.settings import ARRIVAL, LAXITY
from benchmarks.commands.load import DYNAMIC, MAX_BATCH, OBJECTIVE, ONE_BY_ONE
from benchmarks.measurement import Record
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.whole_requests import MODEL, whole_request_server
from benchmarks.workload import NEGATIVE_PROMPTS, PROMPTS
from serving.local_server import local_server
from simulation.goodput_plot import save_goodput_plot
from simulation.report import percentile_of
from simulation.workload import FRAMES_PER_S, LOADS, Request, mixed_requests, shortened

WAYS: Final = (ONE_BY_ONE, DYNAMIC, ARRIVAL, LAXITY)
REQUEST_TIMEOUT_S: Final = 1800.0
REPEATS_ALONE: Final = 2
HEAD: Final = "| way | load | requests per s | p50 s | p99 s | interactive p99 s | good | interactive good |"


@dataclass(frozen=True)
class Way:
    """A server that is measured."""

    name: str
    model: str
    address: str
    takes_priority: bool


@dataclass(frozen=True)
class Found:
    """One run of one way."""

    way: str
    load: float
    throughput: float  # requests per second
    goodput: float  # good ones per second
    p50: float
    p99: float
    interactive_p99: float
    good: float  # a share, as the next
    interactive_good: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "goodput")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="multiples of the engine's capacity")
    parser.add_argument("--requests", type=int, default=100, help="per load and run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="each with other requests (default: %(default)s)")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--length-divisor", type=int, default=1, help="of 1 to 30 s of audio (default: %(default)s)")
    parser.add_argument("--step-divisor", type=int, default=1, help="of 4 to 100 steps (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a .png file (default: beside the CSV file)")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "goodput")

    def drawn(rate: float, seed: int) -> list[Request]:
        requests = mixed_requests(arguments.requests, rate, "poisson", seed)
        return shortened(requests, arguments.length_divisor, arguments.step_divisor)

    found: list[Found] = []
    with running(arguments.ways, run, arguments.requests) as ways:
        yardstick = next((way for way in ways if way.name == ARRIVAL), ways[-1])
        shapes = {shape(request): request for seed in range(arguments.runs) for request in drawn(1.0, seed + 1)}
        for way in ways:
            send(way, [replace(request, arrived=0.0) for request in list(shapes.values())[:2]])
        alone = {key: time_alone(yardstick, request) for key, request in shapes.items()}
        at_once = drawn(inf, 0)
        capacity = len(at_once) / max(send(yardstick, at_once))
        if not capacity or inf in alone.values():
            sys.exit("scripts/benchmark goodput: got an error but expected an answer to each request alone, and to all")
        print(f"capacity {capacity:.4g} requests per s, of {yardstick.name}\n{HEAD}\n{'|---' * 8}|", flush=True)
        for seed in range(arguments.runs):
            for load in arguments.loads:
                requests = drawn(load * capacity, seed + 1)
                for way in ways if seed % 2 == 0 else reversed(ways):
                    one = judge(way.name, load, requests, send(way, requests), alone)
                    run.keep(_record(run, one, load * capacity, len(requests), seed))
                    print(_row(one), flush=True)
                    found.append(one)
    print(f"\nMeans of {arguments.runs} runs\n{HEAD}\n{'|---' * 8}|")
    means = [mean(found, way, load) for way in arguments.ways for load in arguments.loads]
    for one in means:
        print(_row(one))
    lines = {way: [(one.load, one.good) for one in means if one.way == way] for way in arguments.ways}
    plot = save_goodput_plot(
        arguments.plot or arguments.csv.with_suffix(".png"),
        f"Done within {OBJECTIVE:g} times the time alone, measured",
        {f"{run.record.checkpoint}, {run.record.device}": lines},
    )
    print(f"\n{arguments.csv} and {plot}", file=sys.stderr)


@contextmanager
def running(names: Sequence[str], run: Run, requests: int) -> Iterator[list[Way]]:
    """Starts a server for each way; nothing is refused."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways = []
        for name in names:
            print(f"starting: {name}", file=sys.stderr)
            if name in (ARRIVAL, LAXITY):
                # Texts are encoded anew, as in the other ways: the same few come again and again here.
                options = (f"--scheduling={name}", f"--max-waiting={requests}", "--embedding-cache-size=0")
                server = stack.enter_context(
                    local_server(run.checkpoint, directory / name, *run.serve_arguments, *options)
                )
                ways.append(Way(name, ENSEMBLE, f"localhost:{server.grpc_port}", takes_priority=True))
            else:
                max_batch = MAX_BATCH if name == DYNAMIC else 1
                whole = whole_request_server(run.checkpoint, run.device, run.dtype_name, max_batch)
                ways.append(Way(name, MODEL, f"localhost:{stack.enter_context(whole)}", takes_priority=False))
        yield ways


def send(way: Way, requests: Sequence[Request]) -> list[float]:
    """Sends each request when it arrives, whatever the others do. Returns their latencies in seconds; inf: failed."""
    made = [make_inputs(request, index, way.takes_priority) for index, request in enumerate(requests)]

    async def one(client: aio.InferenceServerClient, start: float, index: int) -> float:
        due = start + requests[index].arrived
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        try:
            await client.infer(way.model, made[index], client_timeout=REQUEST_TIMEOUT_S)
        except InferenceServerException as error:
            print(f"{way.name}: {error}", file=sys.stderr)
            return inf
        return time.monotonic() - due

    async def all_of_them() -> list[float]:
        async with aio.InferenceServerClient(way.address) as client:
            start = time.monotonic()
            return list(await asyncio.gather(*(one(client, start, index) for index in range(len(requests)))))

    return asyncio.run(all_of_them())


def time_alone(way: Way, request: Request) -> float:
    return min(send(way, [replace(request, arrived=0.0)])[0] for _ in range(REPEATS_ALONE))


def shape(request: Request) -> tuple[int, int, int]:
    """What its time alone depends on."""
    return request.frames, request.steps, request.waveforms


def judge(
    way: str,
    load: float,
    requests: Sequence[Request],
    latencies: Sequence[float],
    alone: Mapping[tuple[int, int, int], float],
) -> Found:
    good = [
        latency < inf and latency <= OBJECTIVE * alone[shape(request)]
        for request, latency in zip(requests, latencies, strict=True)
    ]
    done = [latency for latency in latencies if latency < inf]
    ends = [request.arrived + latency for request, latency in zip(requests, latencies, strict=True) if latency < inf]
    interactive = [index for index, request in enumerate(requests) if not request.is_batch]
    urgent = [latencies[index] for index in interactive if latencies[index] < inf]
    seconds = max(ends, default=inf) - requests[0].arrived
    return Found(
        way=way,
        load=load,
        throughput=len(done) / seconds,
        goodput=sum(good) / seconds,
        p50=percentile_of(done, 50),
        p99=percentile_of(done, 99),
        interactive_p99=percentile_of(urgent, 99),
        good=sum(good) / len(good),
        interactive_good=sum(good[index] for index in interactive) / len(interactive) if interactive else nan,
    )


def mean(found: Sequence[Found], way: str, load: float) -> Found:
    """The means of the runs of one way at one load."""
    runs = [one for one in found if (one.way, one.load) == (way, load)]
    names = [each.name for each in fields(Found) if each.name not in ("way", "load")]
    return Found(way, load, **{name: statistics.fmean(getattr(one, name) for one in runs) for name in names})


def make_inputs(request: Request, seed: int, takes_priority: bool) -> list[Any]:
    values: dict[str, Any] = {
        "prompt": np.array([PROMPTS[seed % len(PROMPTS)].encode()], dtype=np.object_),
        "negative_prompt": np.array([NEGATIVE_PROMPTS[seed % len(NEGATIVE_PROMPTS)].encode()], dtype=np.object_),
        "audio_length_in_s": np.array([request.frames / FRAMES_PER_S], dtype=np.float32),
        "num_inference_steps": np.array([request.steps], dtype=np.int32),
        "num_waveforms_per_prompt": np.array([request.waveforms], dtype=np.int32),
        "seed": np.array([seed], dtype=np.int64),
    }
    if takes_priority:
        name = BATCH if request.is_batch else INTERACTIVE
        values["priority"] = np.array([name.encode()], dtype=np.object_)
    inputs = []
    for name, value in values.items():
        tensor = aio.InferInput(name, [1, 1], np_to_triton_dtype(value.dtype))
        tensor.set_data_from_numpy(value[None])
        inputs.append(tensor)
    return inputs


def _record(run: Run, found: Found, rate: float, count: int, seed: int) -> Record:
    return replace(
        run.record,
        path=found.way,
        rate_per_s=rate,
        samples=count,
        p50_ms=1000 * found.p50,
        p99_ms=1000 * found.p99,
        clips_per_s=found.throughput,
        goodput_per_s=found.goodput,
        note=f"load {found.load:g}, run {seed + 1}, {found.good:.1%} good, {found.interactive_good:.1%} of interactive",
    )


def _row(found: Found) -> str:
    figures = (found.throughput, found.p50, found.p99, found.interactive_p99)
    shares = (found.good, found.interactive_good)
    cells = [found.way, f"{found.load:g}", *(f"{x:.3g}" for x in figures), *(f"{x:.1%}" for x in shares)]
    return f"| {' | '.join(cells)} |"

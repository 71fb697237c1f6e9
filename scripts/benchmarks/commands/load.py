"""`scripts/benchmark load`: many requests at once, over concurrency and over Poisson rates, three ways.

The engine as it is served; Triton's dynamic batching of whole requests through the reference pipeline; and the
reference pipeline one request at a time. All ways are servers, get the same requests and the same rates.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from audioldm2_triton.contract import ENSEMBLE
from benchmarks.measurement import Record, print_table
from benchmarks.perf_analyzer import Target, install_perf_analyzer, run_load, with_answers, write_input_data
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.server_metrics import change
from benchmarks.whole_requests import MODEL, whole_request_server
from benchmarks.workload import as_inputs, make_rows
from project import CACHE
from serving.local_server import local_server
from serving.metrics import read_metrics

ENGINE: Final = "engine"
DYNAMIC: Final = "dynamic batching of whole requests"
ONE_BY_ONE: Final = "one by one"
WAYS: Final = (ONE_BY_ONE, DYNAMIC, ENGINE)
DIFFERENT_REQUESTS: Final = 24
MAX_BATCH: Final = 8
RATES: Final = (0.5, 0.9, 1.5, 2.5)  # times what one by one can do at best
OBJECTIVE: Final = 3.0  # times the latency of one request alone, one by one


@dataclass(frozen=True)
class Server:
    """One way under load."""

    way: str
    targets: tuple[Target, ...]  # over rates, the first
    metrics_port: int | None


@dataclass(frozen=True)
class Options:
    length_s: float
    steps: int
    concurrencies: tuple[int, ...]
    rates_per_s: tuple[float, ...]  # empty: multiples of what one by one can do
    requests: int
    objective_ms: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "load")
    parser.add_argument("--audio-length-in-s", type=float, default=0.64)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--rates", type=float, nargs="*", default=None, help="Poisson arrivals per second (default: from one by one's)"
    )
    parser.add_argument("--requests", type=int, default=32, help="per concurrency or rate (default: %(default)s)")
    parser.add_argument("--objective-ms", type=float, help=f"default: {OBJECTIVE:g} times one by one's latency alone")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "load")
    options = Options(
        arguments.audio_length_in_s,
        arguments.num_inference_steps,
        tuple(arguments.concurrency),
        tuple(arguments.rates or ()),
        arguments.requests,
        arguments.objective_ms,
    )
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as directory:
        input_data = Path(directory) / "requests.json"
        requests = make_rows(DIFFERENT_REQUESTS, options.length_s, options.steps)
        write_input_data(input_data, [as_inputs(request) for request in requests])
        binary = install_perf_analyzer(CACHE / "perf_analyzer")
        for way in WAYS:
            if way not in arguments.ways:
                continue
            with running(way, run) as server:
                print(f"measuring: {way}", file=sys.stderr)
                # Warms up; where nothing is set, it also says what to aim at.
                alone = run_load(binary, server.targets[0], input_data, 4, concurrency=1)
                options = aim(options, [request.latency for request in alone[1:]])
                for record in under_load(server, run, options, binary, input_data, arguments.rates == []):
                    records.append(run.keep(record))
    print_table(records, sys.stdout)


def aim(options: Options, alone_s: Sequence[float]) -> Options:
    """Rates and objective from the first way's latency alone, unless they are set; the same for all ways."""
    median = statistics.median(alone_s)
    return replace(
        options,
        rates_per_s=options.rates_per_s or tuple(factor / median for factor in RATES),
        objective_ms=options.objective_ms or OBJECTIVE * 1000 * median,
    )


@contextmanager
def running(way: str, run: Run) -> Iterator[Server]:
    if way != ENGINE:
        max_batch = MAX_BATCH if way == DYNAMIC else 1
        with whole_request_server(run.checkpoint, run.device, run.dtype_name, max_batch) as port:
            yield Server(way, (Target(MODEL, "grpc", f"localhost:{port}"),), None)
        return
    # Texts are encoded anew, as in the other ways: the same few come again and again here.
    arguments = (*run.serve_arguments, "--embedding-cache-size=0")
    with (
        tempfile.TemporaryDirectory() as directory,
        local_server(run.checkpoint, Path(directory) / "log", *arguments) as server,
    ):
        ports = {"grpc": server.grpc_port, "http": server.http_port}
        targets = tuple(Target(ENSEMBLE, protocol, f"localhost:{port}") for protocol, port in ports.items())
        yield Server(way, targets, server.metrics_port)


def under_load(
    server: Server, run: Run, options: Options, binary: Path, input_data: Path, without_rates: bool
) -> Iterator[Record]:
    base = replace(run.record, length_s=options.length_s, steps=options.steps, guidance=3.5)
    for target in server.targets:
        for concurrency in options.concurrencies:
            record = replace(base, path=f"{server.way}, {target.protocol}", concurrency=concurrency)
            before = _page(server)
            answered = run_load(binary, target, input_data, max(options.requests, concurrency), concurrency=concurrency)
            yield with_answers(record, answered, options.objective_ms, _rows_per_forward(server, before))
    for rate in () if without_rates else options.rates_per_s:
        record = replace(base, path=f"{server.way}, {server.targets[0].protocol}", rate_per_s=rate)
        before = _page(server)
        try:
            answered = run_load(binary, server.targets[0], input_data, options.requests, rate_per_s=rate)
        except RuntimeError as error:
            yield replace(record, note=f"failed: {str(error)[:200]}")
            continue
        yield with_answers(record, answered, options.objective_ms, _rows_per_forward(server, before))


def _rows_per_forward(server: Server, before: Mapping[str, float]) -> float | None:
    return change(before, _page(server)).rows_per_forward


def _page(server: Server) -> dict[str, float]:
    return {} if server.metrics_port is None else read_metrics(server.metrics_port)

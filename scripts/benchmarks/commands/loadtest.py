"""`scripts/loadtest URL ...`: many requests at once against a server that runs, over concurrency and Poisson rates.

The server may be anywhere, and have any checkpoint: what it does not say is left to it. One address of a server on the
usual ports is enough: the other protocol and the metrics are found beside it.
"""

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from audioldm2_triton import AudioLDM2Client, AudioLDM2Error, ServerInfo
from audioldm2_triton.contract import BATCH, DEFAULT_NUM_INFERENCE_STEPS, ENSEMBLE, PRIORITIES
from audioldm2_triton.errors import invalid
from audioldm2_triton.files import read_prompts
from audioldm2_triton.transport.endpoint import Endpoint, parse_url
from benchmarks.load_plot import save_load_plot
from benchmarks.measurement import Record, append_record, print_table
from benchmarks.perf_analyzer import (
    Target,
    find_perf_analyzer,
    run_load,
    with_answers,
    write_input_data,
)
from benchmarks.server_metrics import change, denoiser_info
from benchmarks.workload import PROMPTS
from project import CACHE
from serving.metrics import read_metrics

USUAL_PORTS: Final = {"grpc": 8001, "http": 8000, "metrics": 8002}
RATES: Final = (0.5, 0.8, 1.1)  # times the best throughput of the concurrencies before
DIFFERENT_REQUESTS: Final = 24  # at least
WARM_UP: Final = 4  # requests, one after the other; the first does not count
_ANSWER_IN_S: Final = 10.0  # for what a server answers at once
_FIRST_ANSWERS_IN_S: Final = 1800.0  # nothing is known yet of how long an answer takes


@dataclass(frozen=True)
class Server:
    """A server under test."""

    targets: tuple[Target, ...]  # one for each protocol
    info: ServerInfo
    metrics: tuple[str, int] | None  # host and port, if it shows any


@dataclass(frozen=True)
class Sweep:
    """What to send."""

    requests: int  # for each concurrency and rate
    concurrencies: tuple[int, ...]
    rates_per_s: tuple[float, ...] | None  # None: multiples of the best throughput
    objective_ms: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", metavar="URL", nargs="+", help="grpc://HOST:PORT or http://HOST:PORT of one server")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="of its metrics (default: HOST:8002, if it has any)")
    parser.add_argument("--model", default=ENSEMBLE, help="default: %(default)s")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, - for standard input; default: eight")
    parser.add_argument("--audio-length-in-s", type=float, help="default: the server's")
    parser.add_argument("--num-inference-steps", type=int, default=DEFAULT_NUM_INFERENCE_STEPS, help="default: 20")
    parser.add_argument("--priority", choices=PRIORITIES, default=BATCH, help="default: batch, behind whoever listens")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    parser.add_argument(
        "--rates", type=float, nargs="*", help=f"Poisson arrivals per second (default: {RATES} of the best throughput)"
    )
    parser.add_argument("--requests", type=int, default=32, help="per concurrency or rate (default: %(default)s)")
    parser.add_argument("--objective-ms", type=float, help="counts the answers that take no longer, as goodput")
    parser.add_argument("--csv", type=Path, default=CACHE / "benchmarks" / "loadtest.csv", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, help="a .png file (default: beside the CSV file)")


def measure(arguments: argparse.Namespace) -> None:
    try:
        server = find_server(arguments.urls, arguments.model, arguments.metrics)
        prompts = PROMPTS if arguments.prompts is None else [text for _, text in read_prompts(arguments.prompts)]
    except AudioLDM2Error as error:
        sys.exit(f"scripts/loadtest: {error}")
    sweep = Sweep(
        arguments.requests,
        tuple(arguments.concurrency),
        None if arguments.rates is None else tuple(arguments.rates),
        arguments.objective_ms,
    )
    base = describe(server, arguments)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as directory:
        input_data = Path(directory) / "requests.json"
        count = max(DIFFERENT_REQUESTS, len(prompts))
        options = (arguments.audio_length_in_s, arguments.num_inference_steps, arguments.priority)
        write_input_data(input_data, make_requests(prompts, count, server.info, *options))
        binary = find_perf_analyzer(CACHE / "perf_analyzer")
        for target in server.targets:
            print(f"measuring: {target.protocol}://{target.address}", file=sys.stderr)
            try:
                for record in under_load(server, target, sweep, base, binary, input_data):
                    append_record(arguments.csv, record)
                    records.append(record)
            except RuntimeError as error:  # not one request alone is answered
                sys.exit(f"scripts/loadtest: {error}")
    print_table(records, sys.stdout)
    plot = save_load_plot(arguments.plot or arguments.csv.with_suffix(".png"), records)
    print(f"\n{arguments.csv} and {plot}", file=sys.stderr)
    if not any(record.samples for record in records):
        sys.exit("scripts/loadtest: got no measurement but expected at least one; the notes above say why")


def find_server(urls: Sequence[str], model: str, metrics: str | None) -> Server:
    """Asks the server that is meant what it is.

    Raises an `AudioLDM2Error` if it does not answer, or an address is none that can be tested.
    """
    endpoints = [_testable(parse_url(url)) for url in urls]
    if len({endpoint.protocol for endpoint in endpoints}) < len(endpoints):
        raise invalid("URL", ", ".join(urls), "one address for each protocol, of one server")
    with AudioLDM2Client(urls[0], model=model) as client:
        info = client.server_info(_ANSWER_IN_S)
    beside = next((host for host, port in map(_host_and_port, endpoints) if port in USUAL_PORTS.values()), None)
    other = next((name for name in ("grpc", "http") if name not in {each.protocol for each in endpoints}), None)
    if beside and other:
        url = f"{other}://{beside}:{USUAL_PORTS[other]}"
        with suppress(AudioLDM2Error), AudioLDM2Client(url, model=model) as client:
            client.server_info(_ANSWER_IN_S)
            endpoints.append(parse_url(url))
    return Server(
        tuple(Target(model, each.protocol, each.address, each.headers) for each in endpoints),
        info,
        _find_metrics(metrics, beside),
    )


def _testable(endpoint: Endpoint) -> Endpoint:
    if endpoint.tls or "/" in endpoint.address:
        raise invalid("URL", endpoint.url, "grpc://HOST:PORT or http://HOST:PORT, without TLS and without a path")
    return endpoint


def _host_and_port(endpoint: Endpoint) -> tuple[str, int]:
    host, _, port = endpoint.address.rpartition(":")
    return host, int(port)


def _find_metrics(given: str | None, beside: str | None) -> tuple[str, int] | None:
    if given is None and beside is None:
        return None
    host, _, port = (given or f"{beside}:{USUAL_PORTS['metrics']}").rpartition(":")
    host = host.strip("[]")
    try:
        page = read_metrics(int(port), host, _ANSWER_IN_S)
    except (OSError, ValueError):
        if given is None:
            return None
        raise invalid("--metrics", given, "HOST:PORT, where Triton shows its metrics") from None
    return (host, int(port)) if page else None


def make_requests(
    prompts: Sequence[str], count: int, info: ServerInfo, length_in_s: float | None, steps: int, priority: str
) -> list[dict[str, Any]]:
    """Returns as many requests, each with a seed of its own; a checkpoint that speaks is to say the prompts."""
    given: dict[str, Any] = {"num_inference_steps": steps, "priority": priority}
    if length_in_s is not None:
        given["audio_length_in_s"] = length_in_s
    chosen = [prompts[seed % len(prompts)] for seed in range(count)]
    spoken = info.transcription == "required"
    return [
        {"prompt": prompt, **({"transcription": prompt} if spoken else {}), "seed": seed, **given}
        for seed, prompt in enumerate(chosen)
    ]


def describe(server: Server, arguments: argparse.Namespace) -> Record:
    """Returns what all records share; empty where the server does not say it."""
    info = denoiser_info(read_page_of(server))
    return Record(
        what="loadtest",
        path="",
        device=info.get("device", ""),
        dtype=info.get("dtype", ""),
        torch="",
        checkpoint=server.info.checkpoint or "",
        length_s=arguments.audio_length_in_s or server.info.native_audio_length_in_s,
        steps=arguments.num_inference_steps,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["scripts/loadtest", *sys.argv[2:]]),
    )


def under_load(
    server: Server, target: Target, sweep: Sweep, base: Record, binary: Path, input_data: Path
) -> Iterable[Record]:
    """Yields a record for each concurrency, then for each rate; with the reason in it where one failed.

    Raises `RuntimeError` if the requests that warm up fail.
    """
    base = replace(base, path=target.protocol)
    alone = run_load(binary, target, input_data, WARM_UP, concurrency=1, timeout_s=_FIRST_ANSWERS_IN_S)
    slowest = max(request.latency for request in alone[1:])
    best = 1 / slowest

    def run(record: Record, count: int, concurrency: int, rate: float) -> Record:
        before = read_page_of(server)
        timeout_s = patience(count, slowest, rate)
        try:
            answered = run_load(binary, target, input_data, count, concurrency, rate, timeout_s)
        except RuntimeError as error:
            return replace(record, note=f"failed: {' '.join(str(error).split())[:200]}")
        seen = change(before, read_page_of(server))
        return replace(with_answers(record, answered, sweep.objective_ms, seen.rows_per_forward), note=str(seen))

    for concurrency in sweep.concurrencies:
        record = replace(base, concurrency=concurrency)
        record = run(record, max(sweep.requests, concurrency), concurrency, 0)
        best = max(best, record.clips_per_s or 0)
        yield record
    rates = tuple(factor * best for factor in RATES) if sweep.rates_per_s is None else sweep.rates_per_s
    for rate in rates:
        # perf_analyzer refuses to send for less than a second.
        yield run(replace(base, rate_per_s=rate), max(sweep.requests, math.ceil(rate)), 0, rate)


def patience(requests: int, alone_s: float, rate_per_s: float) -> float:
    """Returns the seconds within which all must be answered, though the last waits for all before it.

    As if the server took one after the other, twice as slowly as it did alone, after the last had come; and a minute.
    """
    arriving = requests / rate_per_s if rate_per_s else 0.0
    return 60 + 2 * requests * alone_s + 2 * arriving


def read_page_of(server: Server) -> Mapping[str, float]:
    if server.metrics is None:
        return {}
    host, port = server.metrics
    try:
        return read_metrics(port, host, _ANSWER_IN_S)
    except OSError:  # it has gone meanwhile; what clients saw counts all the same
        return {}

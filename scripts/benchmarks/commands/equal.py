"""`scripts/benchmark equal`: requests that are all alike, from clients that each wait for their answer.

Least laxity can gain nothing here, so this shows what it costs: a server for each policy, in turns.
"""

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Final

from tritonclient import grpc

from audioldm2_triton.server.settings import ARRIVAL, LAXITY
from benchmarks.commands.goodput import REQUEST_TIMEOUT_S, Way, make_inputs, running
from benchmarks.run import add_common_arguments, read_run
from simulation.workload import FRAMES_PER_S, Request

POLICIES: Final = (ARRIVAL, LAXITY)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "equal")
    parser.add_argument("--audio-length-in-s", type=float, default=10.24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at once (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=4, help="of each client and turn (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="turns of each policy (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "equal")
    request = Request(0.0, round(arguments.audio_length_in_s * FRAMES_PER_S), arguments.steps)
    print("| clients | clips per s: arrival, laxity | ratio | of each turn |\n|---|---|---|---|", flush=True)
    with running(POLICIES, run, max(arguments.clients)) as ways:
        for clients in arguments.clients:
            for way in ways:
                _clips_per_s(way, request, clients, 1)
            turns = [
                {way.name: _clips_per_s(way, request, clients, arguments.requests) for way in order}
                for order in (ways if turn % 2 == 0 else ways[::-1] for turn in range(arguments.runs))
            ]
            print(_row(clients, turns), flush=True)
    print(f"\n{run.record.checkpoint}, {run.record.device}, {run.record.dtype}, {run.record.commit}", file=sys.stderr)


def _clips_per_s(way: Way, request: Request, clients: int, requests: int) -> float:
    """Each client sends its next request when it has its answer. Raises if there is none."""

    def follow(number: int) -> None:
        inputs = make_inputs(request, number, way.takes_priority)
        with grpc.InferenceServerClient(way.address) as client:
            for _ in range(requests):
                client.infer(way.model, inputs, client_timeout=REQUEST_TIMEOUT_S)

    start = monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(follow, range(clients)))
    return clients * requests / (monotonic() - start)


def _row(clients: int, turns: list[dict[str, float]]) -> str:
    arrival, laxity = (statistics.fmean(turn[policy] for turn in turns) for policy in POLICIES)
    ratios = ", ".join(f"{turn[LAXITY] / turn[ARRIVAL]:.2f}" for turn in turns)
    return f"| {clients} | {arrival:.3g}, {laxity:.3g} | {laxity / arrival:.2f} | {ratios} |"

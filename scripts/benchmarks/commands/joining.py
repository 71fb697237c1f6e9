"""`scripts/benchmark joining`: what a short request pays when a long one is in flight already.

A real server denoises a request of many steps; a short one comes later. Its latency is compared with what it takes
alone, both as medians of one run, and it has to be answered while the long one still runs.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audioldm2_triton import AudioLDM2Client, Progress
from benchmarks.measurement import print_table, with_latencies
from benchmarks.run import Run, add_common_arguments, read_run
from serving.local_server import local_server

LONG_SCHEDULER = "HeunDiscreteScheduler"
MAX_STEPS_AHEAD = 10  # evaluations of the long request before a short one joins, a different number each time


@dataclass(frozen=True)
class Options:
    length_s: float
    long_steps: int
    short_steps: int
    repeats: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "joining")
    parser.add_argument("--audio-length-in-s", type=float, default=0.64)
    parser.add_argument("--long-steps", type=int, default=200)
    parser.add_argument("--short-steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)


def measure(arguments: argparse.Namespace) -> None:
    options = Options(
        arguments.audio_length_in_s, arguments.long_steps, arguments.short_steps, max(1, arguments.repeats)
    )
    run = read_run(arguments, "joining")
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with (
            local_server(run.checkpoint, log, *run.serve_arguments) as server,
            AudioLDM2Client(server.grpc_url) as client,
        ):
            client.server_info()
            measure_joining(client, run, options)


def measure_joining(client: AudioLDM2Client, run: Run, options: Options) -> None:
    def short() -> float:
        return _timed(lambda: _generate(client, options, options.short_steps))

    short()  # warms up
    _generate(client, options, 2, LONG_SCHEDULER)
    alone, joined, long_latencies, first = [], [], [], 0
    for repeat in range(options.repeats):
        alone.append(short())  # interleaved: a busy machine is unfair to neither
        long = LongRequest(client, options, join_after=1 + repeat % MAX_STEPS_AHEAD)
        long.wait_until_joinable()
        joined.append(short())
        first += long.is_running
        long_latencies.append(long.end(cancel=repeat < options.repeats - 1))
    ratio = statistics.median(joined) / statistics.median(alone)
    base = replace(run.record, length_s=options.length_s, guidance=3.5)
    records = [
        with_latencies(replace(base, path="alone", steps=options.short_steps, concurrency=1), alone),
        with_latencies(
            replace(
                base,
                path=f"joining {options.long_steps} steps of {LONG_SCHEDULER}",
                steps=options.short_steps,
                concurrency=2,
                note=f"answered before the long one: {first} of {options.repeats}; {ratio:.2f} times the latency alone",
            ),
            joined,
        ),
        with_latencies(
            replace(
                base,
                path=f"{LONG_SCHEDULER}, joined once",
                steps=options.long_steps,
                concurrency=2,
                note="what the short one would have to wait for if requests were batched whole",
            ),
            long_latencies[-1:],
        ),
    ]
    print_table([run.keep(record) for record in records], sys.stdout)
    print(
        f"\n{options.short_steps} steps alone {1000 * statistics.median(alone):.0f} ms, joining "
        f"{1000 * statistics.median(joined):.0f} ms, ratio {ratio:.2f}; answered first {first} of {options.repeats}"
    )
    if first < options.repeats:
        raise SystemExit(f"joining: got {first} short requests answered first but expected {options.repeats}")


class LongRequest:
    """A request of many steps, on a thread of its own."""

    def __init__(self, client: AudioLDM2Client, options: Options, join_after: int) -> None:
        self._client = client
        self._options = options
        self._join_after = join_after
        self._joinable = threading.Event()
        self._cancelled = threading.Event()
        self._seconds = 0.0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait_until_joinable(self) -> None:
        self._joinable.wait()

    def end(self, cancel: bool) -> float:
        """Its latency in seconds, once it has ended; meaningless where it was cancelled."""
        if cancel:
            self._cancelled.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._seconds

    def _run(self) -> None:
        start = time.perf_counter()
        try:
            events = self._client.stream("rain", **_arguments(self._options, self._options.long_steps, LONG_SCHEDULER))
            for event in events:
                if isinstance(event, Progress) and event.step >= self._join_after:
                    self._joinable.set()
                if self._cancelled.is_set():
                    events.close()
                    break
        except Exception as error:
            self._error = error
        finally:
            self._seconds = time.perf_counter() - start
            self._joinable.set()


def _generate(client: AudioLDM2Client, options: Options, steps: int, scheduler: str | None = None) -> None:
    client.generate("a dog barks", **_arguments(options, steps, scheduler))


def _arguments(options: Options, steps: int, scheduler: str | None) -> dict[str, Any]:
    return {"audio_length_in_s": options.length_s, "num_inference_steps": steps, "scheduler": scheduler, "seed": 1}


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

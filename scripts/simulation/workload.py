"""The requests of a simulation: drawn, or read from a trace."""

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Final

from audioldm2_triton.contract import BATCH, DEFAULT_PRIORITY, PRIORITIES

FRAMES_PER_S: Final = 25  # of the official checkpoints
LENGTHS_IN_S: Final = (1.0, 2.56, 5.12, 10.24, 20.48, 30.0)
LOADS: Final = (0.5, 0.8, 1.0, 1.3, 2.0)  # multiples of a capacity
STEPS: Final = (4, 10, 20, 50, 100)
WAVEFORMS: Final = (1, 1, 2, 4)
BATCH_SHARE: Final = 0.3
BURST_IN_S: Final = 20.0  # in half of this time all arrives, at twice the rate


@dataclass(frozen=True)
class Request:
    """A request on its arrival at the denoiser."""

    arrived: float  # seconds
    frames: int  # latent frames
    steps: int  # evaluations
    waveforms: int = 1
    items: int = 2  # UNet batch items of each waveform
    is_batch: bool = False
    timeout: float = inf  # seconds from its arrival to its deadline


def mixed_requests(count: int, rate: float, arrivals: str, seed: int) -> list[Request]:
    """Draws requests of 1 to 30 s, 4 to 100 steps, 1 to 4 candidates and both priorities.

    Args:
        rate: of arrivals, per second.
        arrivals: `poisson`; or `bursty`: at twice the rate for a while, then none for as long.
    """
    generator = random.Random(seed)
    requests, now = [], 0.0
    for _ in range(count):
        now += generator.expovariate(rate)
        # Each period's arrivals come in its first half.
        arrived = now if arrivals == "poisson" else now - (now % BURST_IN_S) / 2
        requests.append(
            Request(
                arrived,
                frames=round(generator.choice(LENGTHS_IN_S) * FRAMES_PER_S),
                steps=generator.choice(STEPS),
                waveforms=generator.choice(WAVEFORMS),
                is_batch=generator.random() < BATCH_SHARE,
            )
        )
    return requests


def shortened(requests: Sequence[Request], length_divisor: int, step_divisor: int) -> list[Request]:
    """Returns the requests with a fraction of their length and steps, so that a real run ends."""
    return [
        replace(
            request,
            frames=8 * max(1, request.frames // length_divisor // 8),
            steps=max(2, request.steps // step_divisor),
        )
        for request in requests
    ]


def read_trace(path: Path) -> list[Request]:
    """Reads a CSV with `arrived_s`, `frames`, `steps`, and where they are given `waveforms`, `items` and `priority`.

    Raises `ValueError` for an empty trace, or a value that is none.
    """
    with path.open(newline="") as file:
        requests = sorted(_read_rows(csv.DictReader(file)), key=lambda request: request.arrived)
    if not requests:
        raise ValueError(f"{path}: got no requests but expected a line for each")
    return requests


def _read_rows(rows: "csv.DictReader[str]") -> Iterator[Request]:
    for row in rows:
        priority = row.get("priority") or DEFAULT_PRIORITY
        if priority not in PRIORITIES:
            raise ValueError(f"priority: got {priority!r} but expected one of {', '.join(PRIORITIES)}")
        waveforms, items = int(row.get("waveforms") or 1), int(row.get("items") or 2)
        yield Request(
            float(row["arrived_s"]), int(row["frames"]), int(row["steps"]), waveforms, items, priority == BATCH
        )

"""Holding the denoiser before a step, so that no request is done before a test has seen it in flight."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from audioldm2_triton.server import faults
from metrics_page import Metrics, wait_for_metrics
from serving.local_server import LocalServer


@contextmanager
def faults_found_in(fault_directory: Path) -> Iterator[None]:
    """Makes the servers that are started meanwhile look for faults there."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(faults.DIRECTORY_VARIABLE, str(fault_directory))
        yield


@contextmanager
def held_steps(fault_directory: Path) -> Iterator[None]:
    """Holds the next step, and with it all that come after, until the block ends."""
    hold = faults.arm(fault_directory, "denoiser.step", faults.STALL)
    try:
        yield
    finally:
        hold.unlink()


def wait_for_requests(server: LocalServer, count: int, model: str = "denoiser") -> Metrics:
    """Waits until so many requests are in the denoiser, whether they step or wait for room."""

    def held(page: Metrics) -> float:
        gauges = (f"audioldm2_requests_{state}" for state in ("in_flight", "waiting"))
        return sum(page[f'{gauge}{{engine="cpu",model="{model}"}}'] for gauge in gauges)

    return wait_for_metrics(server, lambda page: held(page) == count, f"{count} requests in {model}")

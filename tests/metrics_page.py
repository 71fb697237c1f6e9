"""Triton's `/metrics` page, as numbers."""

import time
import urllib.request
from collections.abc import Callable

from serving.local_server import LocalServer

Metrics = dict[str, float]


def read_metrics(server: LocalServer) -> Metrics:
    """Every sample of the page by name, summed over its labels; also under its whole name with the labels."""
    with urllib.request.urlopen(f"http://localhost:{server.metrics_port}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
    metrics: Metrics = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        metrics[name] = float(value)
        plain = name.partition("{")[0]
        if plain != name:
            metrics[plain] = metrics.get(plain, 0.0) + float(value)
    return metrics


def wait_for_metrics(server: LocalServer, condition: Callable[[Metrics], bool], what: str) -> Metrics:
    """Polls until the page satisfies `condition`."""
    deadline = time.monotonic() + 60
    while True:
        metrics = read_metrics(server)
        if condition(metrics):
            return metrics
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def is_idle(metrics: Metrics) -> bool:
    names = ("rows_in_flight", "rows_waiting", "requests_in_flight", "requests_waiting", "stage_requests")
    return all(metrics[f"audioldm2_{name}"] == 0 for name in names)

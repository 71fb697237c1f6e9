"""Waiting for what the server's metrics say."""

import time
from collections.abc import Callable

from serving import metrics
from serving.local_server import LocalServer

Metrics = dict[str, float]


def read_metrics(server: LocalServer) -> Metrics:
    return metrics.read_metrics(server.metrics_port)


def wait_for_metrics(server: LocalServer, condition: Callable[[Metrics], bool], what: str) -> Metrics:
    """Polls until the page satisfies `condition`."""
    deadline = time.monotonic() + 60
    while True:
        page = read_metrics(server)
        if condition(page):
            return page
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def is_idle(page: Metrics) -> bool:
    names = ("rows_in_flight", "rows_waiting", "requests_in_flight", "requests_waiting", "stage_requests")
    return all(page[f"audioldm2_{name}"] == 0 for name in names)

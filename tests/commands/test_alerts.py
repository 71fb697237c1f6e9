"""A real Prometheus with the rules and the dashboard of `docker/monitoring`, on a real server whose stage is killed."""

import json
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring_files import MONITORING, dashboard_expressions, rules
from serving.local_server import LocalServer, free_ports, local_server
from supervised_server import health, stage, wait_until

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Prometheus:
    port: int

    def ask(self, path: str, **query: str) -> Any:
        url = f"http://localhost:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def is_ready(self) -> bool:
        try:
            return bool(self.ask("query", query="audioldm2_server_ready == 1")["result"])
        except OSError:
            return False

    def alerts(self, state: str) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == state}


@pytest.fixture(scope="module")
def watched(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(tiny_checkpoint, tmp_path_factory.mktemp("watched") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(watched: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus here: it is in Debian's package `prometheus`")
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    # Faster, and on the ports of this server; all else as it ships.
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(MONITORING / "rules.yaml")]
    ports = {"audioldm2-server": watched.metrics_port, "audioldm2-health": watched.health_port}
    for job in configuration["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"localhost:{ports[job['job_name']]}"]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    (port,) = free_ports(1)
    command = [
        program,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        running = Prometheus(port)
        wait_until(running.is_ready, "Prometheus to have read the server's page")
        yield running
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_all_rules_can_be_evaluated(prometheus: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]]:
        found = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        return found if found and all(rule["health"] != "unknown" for rule in found) else []

    found = wait_until(evaluated, "the rules to be evaluated")
    assert {rule["name"] for rule in found} == {rule["alert"] for rule in rules()}
    assert {rule["name"]: rule.get("lastError") for rule in found if rule["health"] != "ok"} == {}


def test_all_queries_of_the_dashboard_are_answered(prometheus: Prometheus) -> None:
    expressions = [each for each in dashboard_expressions() if not each.startswith("label_values")]
    assert expressions
    for expression in expressions:
        prometheus.ask("query", query=expression.replace("$__rate_interval", "1m").replace("$server", ".*"))


def test_a_stage_that_is_killed_is_an_alert(prometheus: Prometheus, watched: LocalServer) -> None:
    assert prometheus.alerts("firing") == set()
    stage(watched, "denoiser").send_signal(signal.SIGKILL)
    wait_until(lambda: "AudioLDM2StageRestarted" in prometheus.alerts("firing"), "the alert")
    wait_until(lambda: health(watched)[0] == 200, "readiness")
    # A short outage is no other alert.
    assert prometheus.alerts("firing") == {"AudioLDM2StageRestarted"}

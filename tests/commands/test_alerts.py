"""A real Prometheus with the rules and the dashboard of `docker/monitoring`, on a real server.

Each alert fires by its fault and clears afterwards, but for the one on a GPU's memory.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from audioldm2_triton import AudioLDM2Client, AudioLDM2Error
from audioldm2_triton.server import faults
from monitoring_files import MONITORING, dashboard_expressions, rules
from server_faults import faults_found_in
from serving.local_server import LocalServer, free_ports, local_server, serve_command
from supervised_server import WAIT_IN_S, health, stage, wait_until
from trials.proxy import Proxy, proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OBJECTIVE_IN_S = 40.96  # of AudioLDM2Slow
HOST_MEMORY = 2**30  # bytes that a server has
SHORT = {"prompt": "rain", "audio_length_in_s": 0.2, "num_inference_steps": 2, "seed": 1}
LONG = {"prompt": ["rain"], "audio_length_in_s": 1.0, "num_inference_steps": 200, "seed": 1}


@dataclass(frozen=True)
class Watched:
    """A small server, and what can be done to it and to those who watch it."""

    server: LocalServer
    faults: Path
    metrics: Proxy  # between Triton's page and Prometheus
    targets: Path  # the health addresses that Prometheus asks

    @property
    def supervisor(self) -> psutil.Process:
        return psutil.Process(self.server.process.pid)

    def watch(self, *health_ports: int) -> None:
        partial = self.targets.with_suffix(".partial")
        partial.write_text(json.dumps([{"targets": [f"localhost:{port}" for port in health_ports]}]))
        partial.rename(self.targets)

    def generate(self, **arguments: Any) -> Any:
        with AudioLDM2Client(self.server.grpc_url, max_retries=0) as client:
            return client.generate(**arguments)


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

    def firing(self) -> set[str]:
        return {each["labels"]["alertname"] for each in self.ask("alerts")["alerts"] if each["state"] == "firing"}


@pytest.fixture(scope="module")
def watched(
    tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    options = ("--max-active-rows=4", "--max-waiting=2", "--stall-timeout-in-s=300", "--max-restart-delay-in-s=0")
    with (
        faults_found_in(fault_directory),
        local_server(tiny_checkpoint, folder / "log", *options) as server,
        proxy(server.metrics_port) as metrics,
    ):
        made = Watched(server, fault_directory, metrics, folder / "targets.json")
        made.watch(server.health_port)
        yield made


@pytest.fixture(scope="module")
def prometheus(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus here: it is in Debian's package `prometheus`")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(in_seconds((MONITORING / "rules.yaml").read_text()))
    # Faster, and on the ports of this server; all else as it ships.
    configuration = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(folder / "rules.yaml")]
    page, supervisor = configuration["scrape_configs"]
    assert (page["job_name"], supervisor["job_name"]) == ("audioldm2-server", "audioldm2-health")
    page["static_configs"] = [{"targets": [f"localhost:{watched.metrics.port}"]}]
    del supervisor["static_configs"]
    supervisor["file_sd_configs"] = [{"files": [str(watched.targets)], "refresh_interval": "1s"}]
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


def in_seconds(text: str) -> str:
    """The rules with a second for each minute; a range has at least five, which are as many scrapes."""

    def seconds(number: str, unit: str) -> int:
        return max(1, int(number) if unit == "m" else int(number) // 60)

    text = re.sub(r"\[(\d+)(m|s)\]", lambda match: f"[{max(5, seconds(match[1], match[2]))}s]", text)
    return re.sub(r"for: (\d+)(m|s)\b", lambda match: f"for: {seconds(match[1], match[2])}s", text)


@contextmanager
def target_down(watched: Watched) -> Iterator[None]:
    watched.supervisor.suspend()
    try:
        yield
    finally:
        watched.supervisor.resume()


@contextmanager
def metrics_down(watched: Watched) -> Iterator[None]:
    watched.metrics.toxics.timeout = True
    try:
        yield
    finally:
        watched.metrics.toxics.timeout = False
        watched.metrics.reset()


@contextmanager
def no_targets(watched: Watched) -> Iterator[None]:
    watched.watch()
    try:
        yield
    finally:
        watched.watch(watched.server.health_port)


@contextmanager
def killed(watched: Watched) -> Iterator[None]:
    stage(watched.server, "denoiser").send_signal(signal.SIGKILL)
    yield


@contextmanager
def start_slow(watched: Watched, *within: str) -> Iterator[None]:
    """A second server, which fetches its checkpoint from a hub that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        ports = free_ports(4)
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}"}
        command = [*within, *serve_command(Path("nobody/nothing"), ports), f"--cache-dir={watched.faults / 'cache'}"]
        with (watched.faults / "second.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            watched.watch(watched.server.health_port, ports[3])
            hub.settimeout(WAIT_IN_S)
            with hub.accept()[0]:
                yield
        finally:
            watched.watch(watched.server.health_port)
            process.terminate()
            process.wait(timeout=WAIT_IN_S)


@contextmanager
def host_memory(watched: Watched) -> Iterator[None]:
    """A second server, in a control group that is its machine's as a container's is, and that another process fills."""
    root = Path("/sys/fs/cgroup/memory")
    limit, use = "memory.limit_in_bytes", "memory.usage_in_bytes"
    if not root.is_dir():
        root, limit, use = root.parent, "memory.max", "memory.current"
    group = root / f"audioldm2-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    join = f"echo $$ > {group}/cgroup.procs"
    within = ("unshare", "--mount", "sh", "-c", f'{join} && mount --bind {group} {root} && exec "$0" "$@"')
    fill = f"held = b'1' * int({HOST_MEMORY * 0.95} - int(open('{group / use}').read())); input()"
    try:
        try:
            (group / limit).write_text(str(HOST_MEMORY))
        except OSError as error:
            pytest.skip(f"no control group here limits memory: {error}")
        with start_slow(watched, *within):
            # The server has asked the hub, so it has all the memory that it needs for now.
            command = ["sh", "-c", f'{join} && exec "$0" -c "$1"', sys.executable, fill]
            with subprocess.Popen(command, stdin=subprocess.PIPE):  # which closes its input at the end
                yield
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the control group to be empty")
        group.rmdir()


@contextmanager
def engine_broken(watched: Watched) -> Iterator[None]:
    """With a supervisor that does not come to it."""
    with target_down(watched):
        faults.arm(watched.faults, "denoiser.loop", faults.RAISE)
        with pytest.raises(AudioLDM2Error, match="engine is broken"):
            watched.generate(**SHORT)
        yield


@contextmanager
def flooded(watched: Watched, **arguments: Any) -> Iterator[None]:
    """Twelve clients that send one request after the other."""
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            with suppress(AudioLDM2Error):
                watched.generate(**LONG, **arguments)

    with ThreadPoolExecutor(12) as pool:
        sent = [pool.submit(send) for _ in range(12)]
        try:
            yield
        finally:
            over.set()
        for each in sent:
            each.result()


def late(watched: Watched) -> AbstractContextManager[None]:
    return flooded(watched, timeout=0.2)


@contextmanager
def stalled(watched: Watched) -> Iterator[None]:
    file = faults.arm(watched.faults, "denoiser.step", faults.STALL)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(watched.generate, **SHORT)
        try:
            wait_until(lambda: faults.has_struck(file), "the step")
            yield
        finally:
            file.unlink()
        call.result()


@contextmanager
def slow(watched: Watched) -> Iterator[None]:
    with stalled(watched):
        time.sleep(OBJECTIVE_IN_S)
    yield


@contextmanager
def out_of_memory(watched: Watched) -> Iterator[None]:
    faults.arm(watched.faults, "decoder.VAE", faults.MEMORY)
    with pytest.raises(AudioLDM2Error, match="memory"):
        watched.generate(**SHORT)
    yield


FAULTS: dict[str, Callable[[Watched], AbstractContextManager[None]]] = {
    "AudioLDM2TargetDown": target_down,
    "AudioLDM2MetricsDown": metrics_down,
    "AudioLDM2NoTargets": no_targets,
    "AudioLDM2NotReady": killed,
    "AudioLDM2StartSlow": start_slow,
    "AudioLDM2EngineBroken": engine_broken,
    "AudioLDM2StageRestarted": killed,
    "AudioLDM2Refusals": flooded,
    "AudioLDM2Waiting": flooded,
    "AudioLDM2Slow": slow,
    "AudioLDM2Stalled": stalled,
    "AudioLDM2DeadlinesMissed": late,
    "AudioLDM2HostMemory": host_memory,
    "AudioLDM2OutOfMemory": out_of_memory,
}
UNTRIED = {"AudioLDM2GPUMemory"}


def test_only_the_gpu_s_memory_is_untried() -> None:
    assert FAULTS.keys() | UNTRIED == {rule["alert"] for rule in rules()}


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


@pytest.mark.parametrize("alert", FAULTS)
def test_an_alert_fires_by_its_fault_and_clears(alert: str, prometheus: Prometheus, watched: Watched) -> None:
    wait_until(lambda: health(watched.server)[0] == 200, "readiness")
    wait_until(lambda: prometheus.firing() == set(), "silence")
    with FAULTS[alert](watched):
        wait_until(lambda: alert in prometheus.firing(), f"{alert} to fire")
    wait_until(lambda: alert not in prometheus.firing(), f"{alert} to clear")

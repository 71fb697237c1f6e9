"""A server seen through its supervisor: its health, its processes, its shared memory."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from serving.local_server import LocalServer
from serving.stage_processes import find_stages

WAIT_IN_S = 120.0


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_IN_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def health(server: LocalServer, path: str = "/ready") -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://localhost:{server.health_port}{path}", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def triton(server: LocalServer) -> psutil.Process:
    # A child of its own has the same name until it has become the process of a model.
    (found,) = (child for child in psutil.Process(server.process.pid).children() if child.name() == "tritonserver")
    return found


def stages(server: LocalServer) -> dict[psutil.Process, str]:
    """The processes of the models, with their names."""
    return find_stages(triton(server).pid)


def stage(server: LocalServer, model: str) -> psutil.Process:
    (found,) = (process for process, name in stages(server).items() if name == model)
    return found


def shared_memory(server: LocalServer) -> set[Path]:
    """The files of the server's run in /dev/shm, which begin with the name of its folder."""
    (folder,) = {Path(word.partition("=")[2]).parent.name for word in triton(server).cmdline() if "repository=" in word}
    return set(Path("/dev/shm").glob(f"{folder}*"))

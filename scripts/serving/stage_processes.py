"""The processes of a server: Triton, and a Python process for each model."""

import contextlib
import os
import re
import signal
from collections.abc import Mapping
from typing import Final

import psutil

from serving.diagnosis import StageProcess

_STUB: Final = "triton_python_backend_stub"
_MODEL: Final = re.compile(r"/models/(\w+)/")


def find_stages(server: int) -> dict[psutil.Process, str]:
    """Returns the processes of the models below the process `server`, with their models' names."""
    stages = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(server).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = " ".join(process.cmdline())
                if _STUB in process.name() or _STUB in command.partition(" ")[0]:
                    named = _MODEL.search(command)
                    stages[process] = named[1] if named else "a model"
    return stages


def observe_stages(stages: Mapping[psutil.Process, str]) -> tuple[StageProcess, ...]:
    return tuple(_observe(process, model) for process, model in stages.items())


def _observe(process: psutil.Process, model: str) -> StageProcess:
    try:
        status = process.status() if process.is_running() else psutil.STATUS_DEAD
    except psutil.NoSuchProcess:
        status = psutil.STATUS_DEAD
    dead = status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)
    return StageProcess(model, not dead, status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))


def creation_time(process: int) -> float:
    """Tells two processes apart that had the same number one after the other."""
    return psutil.Process(process).create_time()


def kill_group(leader: int) -> None:
    """Kills a process, its descendants and its process group, stopped ones too."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(leader).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

"""The processes of a server on this machine, and the memory that they hold."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Final

import psutil

from audioldm2_triton.server.memory import peak_resident_bytes

SERVER: Final = "tritonserver"
STUB: Final = "triton_python_backend_stub"
_INTERVAL_S: Final = 0.02


def server_processes(root: int) -> dict[str, int]:
    """The ids of `tritonserver` and of its stubs, by the model that a stub runs, below the process `root`."""
    found: dict[str, int] = {}
    for process in psutil.Process(root).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue  # it has ended
        name = Path(command[0]).name if command else ""
        if name in (SERVER, STUB):
            found[name if name == SERVER else _unused(_model_of(command), found)] = process.pid
    return dict(sorted(found.items()))


def _model_of(command: list[str]) -> str:
    """A stub's arguments begin with `.../<model>/<version>/model.py`."""
    return Path(command[1]).parent.parent.name


def _unused(name: str, taken: Mapping[str, int]) -> str:
    """A model has a stub for each of its instances."""
    number = sum(other.partition(" ")[0] == name for other in taken)
    return f"{name} {number + 1}" if number else name


def reset_peak(process: int) -> int:
    """Returns the bytes from which the peak grows."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return peak_resident_bytes(process)


class HighestMemory:
    """The most that each of some processes, by name, and all of them at one time have held, in bytes.

    `each` also asks the kernel, which sees what samples miss; its own figure (`VmHWM`) may lag behind the resident set
    by some pages, so that the sum of those figures alone could be less than a sampled sum.
    """

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = {name: psutil.Process(id_) for name, id_ in processes.items()}
        self._each = dict.fromkeys(processes, 0)
        self._lock = Lock()
        self.at_once = 0

    def sample(self) -> None:
        with self._lock:
            held = {name: process.memory_info().rss for name, process in self._processes.items()}
            self._each = {name: max(self._each[name], held[name]) for name in held}
            self.at_once = max(self.at_once, sum(held.values()))

    @property
    def each(self) -> dict[str, int]:
        return {
            name: max(self._each[name], peak_resident_bytes(process.pid)) for name, process in self._processes.items()
        }


@contextmanager
def watching(processes: Mapping[str, int]) -> Iterator[HighestMemory]:
    """Samples what the processes hold, every 20 ms, while a `with` block lasts."""
    highest, done = HighestMemory(processes), Event()

    def watch() -> None:
        while not done.wait(_INTERVAL_S):
            highest.sample()

    highest.sample()
    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()

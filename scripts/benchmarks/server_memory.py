"""The processes of a server on this machine, and the memory that they hold."""

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Final

from audioldm2_triton.server.memory import peak_resident_bytes

SERVER: Final = "tritonserver"
STUB: Final = "triton_python_backend_stub"
PAGE: Final = resource.getpagesize()  # bytes
_INTERVAL_S: Final = 0.02


def server_processes(root: int) -> dict[str, int]:
    """The ids of `tritonserver` and of its stubs, by the model that a stub runs, below the process `root`."""
    parents: dict[int, int] = {}
    commands: dict[int, list[str]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            status = (directory / "status").read_text()
            command = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        process = int(directory.name)
        parents[process] = int(status.partition("\nPPid:")[2].split()[0])
        commands[process] = command

    def is_below(process: int) -> bool:
        while process in parents and process != root:
            process = parents[process]
        return process == root

    found: dict[str, int] = {}
    for process, command in commands.items():
        name = Path(command[0]).name
        if name in (SERVER, STUB) and is_below(process):
            found[name if name == SERVER else _unused(_model_of(command), found)] = process
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
        self._processes = dict(processes)
        self._each = dict.fromkeys(processes, 0)
        self._lock = Lock()
        self.at_once = 0

    def sample(self) -> None:
        with self._lock:
            held = {name: resident_bytes(process) for name, process in self._processes.items()}
            self._each = {name: max(self._each[name], held[name]) for name in held}
            self.at_once = max(self.at_once, sum(held.values()))

    @property
    def each(self) -> dict[str, int]:
        return {name: max(self._each[name], peak_resident_bytes(id_)) for name, id_ in self._processes.items()}


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


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

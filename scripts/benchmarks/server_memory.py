"""The processes of a server on this machine, and the memory that they hold."""

import resource
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Final

from audioldm2_triton.memory import peak_resident_bytes

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


class HighestSum:
    """The most that processes have held at one time, in bytes, as far as samples tell."""

    def __init__(self, processes: Iterable[int]) -> None:
        self._files = [Path(f"/proc/{process}/statm") for process in processes]
        self.value = 0

    def sample(self) -> None:
        pages = sum(int(file.read_text().split()[1]) for file in self._files)
        self.value = max(self.value, pages * PAGE)


@contextmanager
def watching(processes: Iterable[int]) -> Iterator[HighestSum]:
    """Samples what the processes hold together, every 20 ms, while a `with` block lasts."""
    highest, done = HighestSum(processes), Event()

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

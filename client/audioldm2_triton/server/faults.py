"""Fault points: named places at which a test can make the code raise, stall or compute NaN.

Requests cannot reach any of this. Only a process started with `TEST_FAULTS_DIRECTORY` in its environment looks for
faults, and only in that directory; `scripts/serve` has no such option.

A fault is a file in that directory, named after the point. It contains the kind, and how often it strikes: `raise 1`.
"""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

DIRECTORY_VARIABLE: Final = "TEST_FAULTS_DIRECTORY"
RAISE: Final = "raise"  # a RuntimeError
PANIC: Final = "panic"  # not an `Exception`, like the panics of Rust libraries
STALL: Final = "stall"  # until the file is gone
MEMORY: Final = "memory"  # a MemoryError
NAN: Final = "nan"  # instead of what was computed
LEAK: Final = "leak"  # keeps a mebibyte more each time
_ANYWHERE: Final = (RAISE, PANIC, STALL)

POINTS: Final[Mapping[str, tuple[str, ...]]] = {
    "text_conditioning.parse": _ANYWHERE,
    "text_conditioning.encode": (*_ANYWHERE, MEMORY, NAN),
    "denoiser.parse": _ANYWHERE,
    "denoiser.control": (RAISE, PANIC),  # a request for progress, or to cancel
    "denoiser.schedule": _ANYWHERE,  # on the thread that builds those that are new
    "denoiser.submit": _ANYWHERE,
    "denoiser.loop": _ANYWHERE,  # in the engine's thread, where nobody is to blame
    "denoiser.is_cancelled": _ANYWHERE,
    "denoiser.admit": _ANYWHERE,
    "denoiser.regroup": (*_ANYWHERE, MEMORY, NAN),
    "denoiser.step": (*_ANYWHERE, MEMORY),
    "denoiser.collect": (*_ANYWHERE, MEMORY),
    "denoiser.listener": _ANYWHERE,
    "denoiser.observer": _ANYWHERE,
    "denoiser.callback": _ANYWHERE,
    "denoiser.answer": _ANYWHERE,
    "decoder.parse": (*_ANYWHERE, LEAK),
    "decoder.VAE": (*_ANYWHERE, MEMORY, NAN),
    "decoder.vocoder": (*_ANYWHERE, MEMORY, NAN),
    "decoder.score": (*_ANYWHERE, MEMORY, NAN),
    "audioldm2_stream.parse": _ANYWHERE,
    "audioldm2_stream.start": _ANYWHERE,  # of its thread
    "audioldm2_stream.serve": _ANYWHERE,
    "audioldm2_stream.denoise": _ANYWHERE,
    "audioldm2_stream.watch": _ANYWHERE,
    "audioldm2_stream.send": _ANYWHERE,
}
"""Each point, and the kinds of fault that it allows."""

_STALL_POLL_IN_S: Final = 0.005
_lock = threading.Lock()
_leaked: list[bytes] = []
_directory: Path | None = Path(os.environ[DIRECTORY_VARIABLE]) if DIRECTORY_VARIABLE in os.environ else None


class Panic(BaseException):
    """Stands for the panics of libraries, which are not an `Exception`."""


def at(point: str, value: T = None) -> T:  # type: ignore[assignment]
    """Returns `value`, unless a test has armed a fault here."""
    return value if _directory is None else _strike(_directory, point, value)


def use_directory(directory: Path | None) -> None:
    """Looks for faults in this directory from now on, for tests in one process; None: nowhere."""
    global _directory
    _directory = directory


def arm(directory: Path, point: str, kind: str, times: int = 1) -> Path:
    """Creates the fault. Returns its file, which is gone after that many strikes; a stall lasts until it is removed."""
    if kind not in POINTS[point]:
        raise ValueError(f"kind: got {kind!r} but expected one of {', '.join(POINTS[point])} at {point}")
    file = directory / point
    partial = directory / f"{point}.partial"
    partial.write_text(f"{kind} {times}")
    partial.rename(file)
    return file


def has_struck(file: Path) -> bool:
    """Returns whether a stall is blocking a thread, or another fault has struck as often as it may."""
    try:
        return file.read_text().endswith(" 0")
    except FileNotFoundError:
        return True


def _strike(directory: Path, point: str, value: Any) -> Any:
    if point not in POINTS:
        raise ValueError(f"point: got {point!r} but expected one of {', '.join(POINTS)}")
    file = directory / point
    with _lock:
        if not file.exists():
            return value
        kind, times = file.read_text().split()
        left = int(times) - 1
        if left < 0:
            return value
        if left > 0 or kind == STALL:
            file.write_text(f"{kind} {left}")
        else:
            file.unlink()
    if kind == STALL:
        while file.exists():
            time.sleep(_STALL_POLL_IN_S)
        return value
    if kind == NAN:
        return value * float("nan")
    if kind == LEAK:
        _leaked.append(os.urandom(2**20))
        return value
    if kind == MEMORY:
        raise MemoryError(f"fault at {point}")
    if kind == PANIC:
        raise Panic(f"fault at {point}")
    raise RuntimeError(f"fault at {point}")

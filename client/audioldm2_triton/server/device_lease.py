"""Decides whose weights are on a device: the stage processes of one device take turns with a lock on a file.

A lock of `flock` ends with its process, so a process that crashes releases it.
"""

import fcntl
import os
from pathlib import Path
from typing import Final

from audioldm2_triton.server.settings import SettingsError

LEASES: Final = Path("/dev/shm")
"""The directory of the files: visible to all processes of the machine or container, and empty when it starts."""


class DeviceLease:
    """The right to have weights on one device, held by one process at a time.

    First come, first served: the first to wait for the lease also holds the queue, so that a holder that yields is not
    the next to get it. Used by one thread at a time.

    Raises `SettingsError` if the directory is in a file system without locks.

    Args:
        device: a name of the device that is the same in all processes, such as `cpu`.
    """

    def __init__(self, device: str, directory: Path = LEASES) -> None:
        # One lease per user, because another user's files could not be opened.
        stem = f"audioldm2-{os.getuid()}-{device}"
        self._queue, self._lease = (_open(directory / f"{stem}.{kind}") for kind in ("queue", "lease"))
        try:
            self.is_wanted()
        except OSError as error:
            self.close()
            raise SettingsError(f"offload: {directory} has no locks ({error.strerror}); turn offload off") from error

    def acquire(self) -> None:
        """Waits until the lease is free."""
        fcntl.flock(self._queue, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lease, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._queue, fcntl.LOCK_UN)

    def release(self) -> None:
        fcntl.flock(self._lease, fcntl.LOCK_UN)

    def is_wanted(self) -> bool:
        """Returns whether another process waits for the lease; for its holder to ask."""
        try:
            fcntl.flock(self._queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._queue, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Releases whatever is held."""
        for file in (self._queue, self._lease):
            os.close(file)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

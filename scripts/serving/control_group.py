"""The memory that the server's container, or its machine, uses and may use."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

# Version 2, then version 1: the controller's folder, its files of use and limit, and the key in memory.stat.
_FILES: Final = (
    ("", "memory.current", "memory.max", "inactive_file"),
    ("memory", "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class HostMemory:
    """Memory in bytes. Used is what cannot be given back: without files that were read and are not in use."""

    used: int
    limit: int


def host_memory(control_groups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Returns the memory of the control group, where one limits it below the machine's; otherwise the machine's."""
    machine = psutil.virtual_memory()
    for folder, use, limit, inactive in _FILES:
        with contextlib.suppress(OSError, ValueError):  # of "max", too: no limit
            group = control_groups / folder
            allowed = int((group / limit).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / use).read_text()) - int(statistics.get(inactive, 0))
            if allowed < machine.total:
                return HostMemory(max(used, 0), allowed)
    return HostMemory(machine.total - machine.available, machine.total)

"""What tests of `scripts/checkpoint fetch` share: its outcome, and what it has left."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hub_stand_in import Hub


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


Fetch = Callable[..., Result]


def hub_environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Of a process that fetches from the stand-in."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return inherited | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home")}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def assert_refused(result: Result, out: Path, *words: str) -> None:
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("checkpoint: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last
    assert not out.exists()

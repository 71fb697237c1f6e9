"""The supervisor's metrics: one state at a time, and the memory of the container or of the machine."""

from pathlib import Path

import psutil
import pytest

from serving.control_group import HostMemory, host_memory
from serving.health import STATES, Health


@pytest.mark.parametrize("state", STATES)
def test_one_state_at_a_time(state: str) -> None:
    lines = Health(state, restarts=3).metrics().splitlines()
    assert [line for line in lines if line.startswith("audioldm2_server_state") and line.endswith(" 1")] == [
        f'audioldm2_server_state{{state="{state}"}} 1'
    ]
    assert f"audioldm2_server_ready {int(state == 'ready')}" in lines
    assert "audioldm2_server_restarts_total 3" in lines


@pytest.mark.parametrize(
    ("folder", "used", "limit", "inactive"),
    [
        (".", "memory.current", "memory.max", "inactive_file"),
        ("memory", "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
    ],
)
def test_the_limit_of_a_container_counts(folder: str, used: str, limit: str, inactive: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / used).write_text("7000\n")
    (tmp_path / folder / limit).write_text("9000\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 5000\n{inactive} 1000\n")
    assert host_memory(tmp_path) == HostMemory(used=6000, limit=9000)


@pytest.mark.parametrize("limit", ["max\n", f"{2**63 - 4096}\n"])
def test_without_a_limit_the_machine_counts(limit: str, tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.stat").write_text("anon 5000\n")
    assert host_memory(tmp_path).limit == psutil.virtual_memory().total

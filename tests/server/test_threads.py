"""Threads by measurement: the CPU time of the work decides, whatever else the machine does."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from audioldm2_triton.server import threads
from audioldm2_triton.server.threads import set_measured_threads, usable_cores

QUOTA = threads._quota


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads, "_quota", lambda _: None)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("milliseconds", "expected"), [(1, 1), (99, 1), (101, 2), (249, 4), (5000, 8)])
def test_a_thread_for_each_share(milliseconds: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])

    def work() -> None:
        assert torch.get_num_threads() == 1
        clock[0] += milliseconds / 1000

    assert set_measured_threads(work) == expected
    assert torch.get_num_threads() == expected


def test_waiting_for_a_core_is_not_work() -> None:
    assert set_measured_threads(lambda: time.sleep(2 * threads.SHARE_IN_S)) == 1


def test_the_environment_decides_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)

    def fail() -> None:
        raise AssertionError("nothing is to be measured")

    assert set_measured_threads(fail) == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_quota_counts(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_quota", QUOTA)
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    assert usable_cores(tmp_path) == expected

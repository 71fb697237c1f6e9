"""A short run of `scripts/soak`, and its verdicts on runs that are known to be flat, or not."""

from pathlib import Path

import pytest

from audioldm2_triton.server import faults
from server_faults import faults_found_in
from serving.local_server import LocalServer, local_server
from trials.soak import soak
from trials.watching import Sample, growth, left_behind

MIB = 2**20


def test_mixed_load_has_right_audio_and_leaves_nothing(server: LocalServer) -> None:
    outcomes, samples = soak(server, count=60, clients=4, seed=1)
    assert not outcomes.wrong
    assert sum(outcomes.counts.values()) == 60
    assert {"right", "cancelled", "killed"} <= set(outcomes.counts)
    assert {"decoder", "denoiser", "text_conditioning", "tritonserver"} <= {sample.process for sample in samples}
    assert not left_behind(server)


@pytest.mark.slow
def test_a_planted_leak_is_caught(tiny_checkpoint: Path, fault_directory: Path, tmp_path: Path) -> None:
    with faults_found_in(fault_directory), local_server(tiny_checkpoint, tmp_path / "log") as server:
        faults.arm(fault_directory, "decoder.parse", faults.LEAK, times=10**9)
        outcomes, samples = soak(server, count=400, clients=8, seed=1)
    assert not outcomes.wrong
    assert any(found.startswith("decoder: resident memory") for found in growth(samples))


def samples(resident: list[int], threads: int = 9, later_threads: int = 9) -> list[Sample]:
    half = len(resident) // 2
    return [
        Sample(float(at), "decoder", mebibytes * MIB, threads if at < half else later_threads, 5)
        for at, mebibytes in enumerate(resident)
    ]


def test_growth_is_seen_in_the_second_half_only() -> None:
    assert growth(samples([100, 300, 500, 501, 500, 502])) == []
    assert growth(samples([500 + at for at in range(100)])) == []  # 25 MiB above the mean of the second half
    (found,) = growth(samples([500 + 3 * at for at in range(100)]))
    assert found.startswith("decoder: resident memory")
    assert growth(samples([5000] * 10 + [5000, 5000, 5000, 5250])) != []
    assert growth(samples([500] * 10, 9, 40)) == ["decoder: 31 more threads"]
    assert growth([Sample(float(at), "shared memory", at * 10 * MIB, 0, 4) for at in range(20)]) == [
        "the shared memory has grown by 100 MiB"
    ]

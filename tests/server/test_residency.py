"""Weights that are on their device only while a stage works: the lease, the two stores, and an engine between them."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SpeechT5HifiGan

from audioldm2_triton.server import device_lease
from audioldm2_triton.server import residency as module
from audioldm2_triton.server.device_lease import DeviceLease
from audioldm2_triton.server.residency import MappedStore, PinnedStore, Residency, stage_residency
from audioldm2_triton.server.settings import Settings, SettingsError, read_settings, resolve_compile
from engine.engine import Engine
from engine.limits import EngineLimits
from engine_workload import TABLES, Outcomes, WatchedUNet, assert_is_reference, make_request
from stepping.forward_plan import ALWAYS_MIX

CPU = torch.device("cpu")
HOLDER = """
import sys
from pathlib import Path
from audioldm2_triton.server.device_lease import DeviceLease
lease = DeviceLease("cpu", Path(sys.argv[1]))
lease.acquire()
Path(sys.argv[1], "was-held").touch()
print("held", flush=True)
if sys.stdin.readline():
    lease.release()
"""


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[DeviceLease]:
    lease = DeviceLease("cpu", tmp_path)
    yield lease
    lease.close()


def start_holder(folder: Path) -> "subprocess.Popen[str]":
    """Another process that wants the lease, says so when it has it, and releases it at a line of input."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_until_wanted(lease: DeviceLease) -> None:
    waited = threading.Event()
    while not lease.is_wanted():
        assert not waited.wait(0.01)


@pytest.mark.parametrize("ending", ["released", "killed"])
def test_the_lease_excludes_other_processes_until_they_release_it_or_die(
    lease: DeviceLease, tmp_path: Path, ending: str
) -> None:
    with start_holder(tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        acquired = threading.Event()

        def acquire() -> None:
            lease.acquire()
            acquired.set()

        thread = threading.Thread(target=acquire)
        thread.start()
        other = DeviceLease("cpu", tmp_path)
        wait_until_wanted(other)  # the thread waits
        assert not acquired.is_set()
        if ending == "released":
            holder.stdin.write("\n")
            holder.stdin.flush()
        else:
            holder.kill()
        thread.join(timeout=60)
        assert acquired.is_set()
        assert not other.is_wanted()
        other.close()


def test_who_gives_way_is_not_the_first_to_come_back(lease: DeviceLease, tmp_path: Path) -> None:
    lease.acquire()
    with start_holder(tmp_path) as other:
        wait_until_wanted(lease)
        assert not (tmp_path / "was-held").exists()
        lease.release()
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        lease.acquire()
        assert (tmp_path / "was-held").exists()


class Network(nn.Module):
    """All that a store has to keep: dtypes, memory formats, places in a cache line, tied weights, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.embedding = nn.Embedding(5, 8, dtype=torch.bfloat16)
        self.tied = nn.Linear(8, 5, bias=False, dtype=torch.bfloat16)
        self.tied.weight = self.embedding.weight
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("transposed", torch.randn(4, 6).t())
        self.register_buffer("off_a_cache_line", torch.randn(9)[1:])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(images)).mean((2, 3)) @ self.tied.weight.float().t()


@torch.inference_mode()
def outputs(network: Network) -> torch.Tensor:
    return network(torch.ones(2, 3, 9, 9))


def described(network: Network) -> dict[str, tuple[Any, ...]]:
    return {
        name: (tensor.shape, tensor.dtype, tensor.stride(), tensor.data_ptr() % 64, tensor.clone())
        for name, tensor in network.state_dict().items()
    }


def assert_same(network: Network, before: dict[str, tuple[Any, ...]]) -> None:
    for name, (*layout, values) in described(network).items():
        assert (name, *layout) == (name, *before[name][:-1])
        assert torch.equal(values, before[name][-1])
    assert network.tied.weight is network.embedding.weight


def test_a_mapped_home_changes_no_bit(lease: DeviceLease) -> None:
    network = Network().eval()
    before, expected = described(network), outputs(network)
    residency = Residency(CPU, lease)
    with residency:
        residency.adopt(network)
        assert isinstance(residency._store, MappedStore)
        assert torch.equal(outputs(network), expected)
    for _ in range(2):
        with residency:
            assert torch.equal(outputs(network), expected)
        assert_same(network, before)


def resident_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def test_a_mapped_home_is_resident_only_inside(lease: DeviceLease) -> None:
    size = 64 * 2**20
    layer = nn.Linear(4096, size // 4 // 4096, bias=False)
    expected = layer.weight.sum()
    residency = Residency(CPU, lease)
    with residency:
        residency.adopt(layer)
        assert layer.weight.sum() == expected
        inside = resident_bytes()
    assert inside - resident_bytes() > 0.9 * size
    with residency:
        assert layer.weight.sum() == expected
        assert resident_bytes() > inside - 0.1 * size


def test_a_mapped_home_that_does_not_fit_on_the_disk_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MappedStore([torch.zeros(3)])


def test_nothing_keeps_the_file_that_the_weights_were_read_from(
    lease: DeviceLease, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """transformers leaves buffers that are views, and the base of a view is the whole mapped file."""
    path = shutil.copytree(tiny_checkpoint / "vocoder", tmp_path / "vocoder")  # other tests keep theirs mapped
    vocoder = SpeechT5HifiGan.from_pretrained(path).eval()
    expected = {name: tensor.clone() for name, tensor in vocoder.state_dict().items()}

    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    assert mapped()
    residency = Residency(CPU, lease)
    with residency:
        residency.adopt(vocoder)
        assert not mapped()
        assert {name: tensor.tolist() for name, tensor in vocoder.state_dict().items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }


def test_a_pinned_home_puts_all_weights_on_the_device_and_takes_them_back() -> None:
    """With the CPU in a GPU's place: what is on the device is a copy all the same."""
    network = Network().eval()
    before, expected = described(network), outputs(network)
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.numel()]
    store = PinnedStore(tensors, CPU)

    def storages() -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    assert storages() == {store._block.data_ptr()}
    for in_inference in (True, False):
        with torch.inference_mode(in_inference):  # as an engine does, and as loading does
            store.load()
        assert len(storages()) == 1  # one transfer
        assert storages() != {store._block.data_ptr()}
        assert torch.equal(outputs(network), expected)
        assert_same(network, before)
        store.unload()
        assert storages() == {store._block.data_ptr()}
        assert_same(network, before)


def test_weights_that_do_not_fit_give_the_lease_back(lease: DeviceLease, tmp_path: Path) -> None:
    residency = Residency(CPU, lease)
    with residency:
        residency.adopt(nn.Linear(2, 2))
    store = residency._store
    assert store is not None

    def fail() -> None:
        raise torch.OutOfMemoryError

    store.load = fail  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        residency.enter()
    other = DeviceLease("cpu", tmp_path)
    other.acquire()
    other.close()


def test_of_nested_blocks_the_outermost_leaves(lease: DeviceLease, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[None] = []
    monkeypatch.setattr(lease, "release", lambda: released.append(None))
    residency = Residency(CPU, lease)
    with residency:
        with residency:
            pass
        assert not released
    assert len(released) == 1


def test_without_offload_nothing_is_moved_and_nobody_waits() -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight.data_ptr()
    first, second = (stage_residency(Settings("checkpoint"), CPU) for _ in range(2))
    with first, second:
        first.adopt(layer)
    assert layer.weight.data_ptr() == weight


def test_offload_compiles_nothing() -> None:
    assert not resolve_compile(Settings("checkpoint", offload="on"), torch.device("cuda"))
    assert resolve_compile(Settings("checkpoint"), torch.device("cuda"))
    for given in ({"offload": "on", "compile": "on"}, {"offload": "auto"}):
        with pytest.raises(SettingsError, match=r"got .(on|auto)..* but expected"):
            read_settings({"checkpoint": "c", **given}, {})


class WatchedResidency(Residency):
    """Counts the turns."""

    def __init__(self, lease: DeviceLease) -> None:
        super().__init__(CPU, lease)
        self.turns = 0
        self.failures = 0
        self.rests = threading.Event()

    def enter(self) -> None:
        if self._entered_at is None:
            self.rests.clear()
            self.turns += 1
            if self.failures:
                self.failures -= 1
                raise MemoryError
        super().enter()

    def leave(self) -> None:
        super().leave()
        self.rests.set()


@pytest.fixture
def residency(lease: DeviceLease) -> WatchedResidency:
    return WatchedResidency(lease)


@pytest.fixture
def unet() -> WatchedUNet:
    return WatchedUNet()


@pytest.fixture
def engine(residency: WatchedResidency, unet: WatchedUNet) -> Iterator[Engine]:
    engine = Engine(unet, TABLES, EngineLimits(16, 16), lambda: ALWAYS_MIX, CPU, torch.float32, residency=residency)
    engine.wait_until_warm()
    yield engine
    if unet.gate is not None:
        unet.gate.release(1000)
    engine.close()


def test_an_engine_gives_way_between_two_steps_and_rests_when_it_is_idle(
    engine: Engine, residency: WatchedResidency, unet: WatchedUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_IN_S", 0.0)
    assert residency.rests.wait(60)
    unet.gate = threading.Semaphore(0)
    outcomes, request = Outcomes(), make_request(1, steps=12)
    engine.submit(request, outcomes.callback(1))
    unet.gate.release(3)
    waited = threading.Event()
    while len(unet.forwards) < 3:
        assert not waited.wait(0.01)
    with closing(DeviceLease("cpu", tmp_path)) as other, closing(DeviceLease("cpu", tmp_path)) as probe:
        thread = threading.Thread(target=other.acquire, daemon=True)
        thread.start()
        wait_until_wanted(probe)
        unet.gate.release(1)  # of the step under way
        thread.join(timeout=60)
        assert not thread.is_alive()
        wait_until_wanted(probe)  # the engine wants to go on, and does not before it may
        done = len(unet.forwards)
        assert 3 <= done <= 4
        unet.gate.release(100)
        other.release()
        _, outcome = outcomes.next()
        assert_is_reference(outcome, request)
        assert len(unet.forwards) == 12
        assert residency.rests.wait(60)
        other.acquire()  # it is free


def test_a_turn_that_fails_fails_its_requests_only(
    engine: Engine, residency: WatchedResidency, unet: WatchedUNet
) -> None:
    assert residency.rests.wait(60)
    outcomes = Outcomes()
    residency.failures = 1
    engine.submit(make_request(1), outcomes.callback(1))
    assert isinstance(outcomes.next()[1], MemoryError)
    request = make_request(2)
    engine.submit(request, outcomes.callback(2))
    assert_is_reference(outcomes.next()[1], request)
    assert engine.broken is None
    assert (2,) * 2 in unet.forwards


def test_no_lease_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(device_lease.fcntl, "flock", refuse)
    with pytest.raises(SettingsError, match=r"offload: .* has no locks .*; turn offload off"):
        DeviceLease("cpu", tmp_path)

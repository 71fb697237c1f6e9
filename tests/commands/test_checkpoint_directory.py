"""When `scripts/serve` verifies a checkpoint: before its first start, and again after any change."""

import os
import shutil
from pathlib import Path

import pytest

from serving import checkpoint_directory
from serving.checkpoint_directory import VERDICTS, local_checkpoint, verify_checkpoint
from serving.server_error import ServerError


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verifications that were run, in place of them."""
    run: list[str] = []
    monkeypatch.setattr(checkpoint_directory, "_run_checkpoint_command", lambda *arguments: run.append(arguments[2]))
    return run


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_what_has_not_changed_is_verified_once(runs: list[str], checkpoint: Path, tmp_path: Path) -> None:
    for _ in range(2):
        verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    assert runs == [str(checkpoint)]


def test_another_content_of_the_same_size_and_time_is_verified(
    runs: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    weights = next((checkpoint / "vae").glob("*.safetensors"))
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[::-1])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    assert len(runs) == 2


@pytest.mark.parametrize("change", ["one more", "one less", "library"])
def test_after_any_change_it_is_verified(
    change: str, runs: list[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    match change:
        case "one more":
            (checkpoint / "unet" / "another.json").write_text("{}")
        case "one less":
            (checkpoint / "unet" / "config.json").unlink()
        case "library":
            monkeypatch.setattr(checkpoint_directory, "version", lambda _: "another")
    verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    assert len(runs) == 2


def test_what_was_not_whole_is_verified_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ServerError("not whole")

    monkeypatch.setattr(checkpoint_directory, "_run_checkpoint_command", fail)
    for _ in range(2):
        with pytest.raises(ServerError, match="not whole"):
            verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")


@pytest.mark.parametrize("content", ["", "[]", '{"/else'])
def test_without_usable_verdicts_it_is_verified(
    content: str, runs: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / VERDICTS).write_text(content)
    verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    assert len(runs) == 1


def test_without_a_cache_it_is_verified_each_time(runs: list[str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    for _ in range(2):
        verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    assert len(runs) == 2


def test_verdicts_of_directories_that_are_gone_are_forgotten(runs: list[str], checkpoint: Path, tmp_path: Path) -> None:
    another = Path(shutil.copytree(checkpoint, tmp_path / "another"))
    verify_checkpoint(another, tmp_path / "cache", "--checkpoint")
    shutil.rmtree(another)
    verify_checkpoint(checkpoint, tmp_path / "cache", "--checkpoint")
    assert str(another) not in (tmp_path / "cache" / VERDICTS).read_text()
    assert len(runs) == 2


def test_a_directory_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "checkpoint").mkdir(parents=True)
    assert local_checkpoint("some/checkpoint", tmp_path, "--checkpoint") == tmp_path / "some" / "checkpoint"

"""Which files of a repository a fetch chooses: variants, revisions, and what it refuses before any download."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from checkpoints import hub as fetching
from environments import python
from hub_fetching import Fetch, assert_refused, contents, hub_environment
from hub_stand_in import Hub
from project import ROOT
from serving.local_server import free_ports

UNET = "unet/diffusion_pytorch_model.safetensors"


def rename_weights(directory: Path, suffix: str) -> None:
    for path in directory.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", suffix)))


def test_weights_as_variants(hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """All of them, as a repository with nothing else has them; named before anything is downloaded."""
    rename_weights(hub.directory, ".fp16.safetensors")
    out = tmp_path / "out"
    assert_refused(fetch(hub, out), out, "language_model/model.fp16.safetensors only", "--variant fp16")
    assert_refused(fetch(hub, out, "--variant=bf16"), out, "--variant fp16")
    assert not hub.ranges
    assert fetch(hub, out, "--variant=fp16").returncode == 0
    fetched = contents(out)
    assert json.loads(fetched.pop("revision.json"))["variant"] == "fp16"
    assert fetched == contents(tiny_checkpoint)


def test_a_variant_instead_of_the_plain_weights(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    """Where a component has both; the others have one. A change of mind half-way starts anew."""
    other = (hub.directory / UNET).read_bytes()[:-4] + b"\0\0\0\0"
    (hub.directory / UNET.replace(".safetensors", ".fp16.safetensors")).write_bytes(other)
    hub.cut_after["vae/diffusion_pytorch_model.safetensors"] = 1000
    assert fetch(hub, tmp_path / "out").returncode == 1
    hub.cut_after.clear()
    assert fetch(hub, tmp_path / "out", "--variant=fp16").returncode == 0
    assert (tmp_path / "out" / UNET).read_bytes() == other
    assert len(list((tmp_path / "out" / "unet").glob("*.safetensors"))) == 1


def test_pickles_only_are_refused_with_a_way_out(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    rename_weights(hub.directory, ".bin")
    out = tmp_path / "out"
    assert_refused(fetch(hub, out), out, "language_model/model.bin only", "--revision refs/pr/3", "REPO_ID@refs/pr/3")
    assert not hub.ranges


def test_no_weights_at_all_are_refused_before_anything_is_downloaded(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    (hub.directory / "vocoder" / "model.safetensors").unlink()
    assert_refused(fetch(hub, tmp_path / "out"), tmp_path / "out", "got no weights in vocoder/")
    assert not hub.ranges


def test_a_revision_of_a_pull_request(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.branch = "refs/pr/3"
    assert_refused(fetch(hub, tmp_path / "out"), tmp_path / "out", "has no revision 'main'")
    assert fetch(hub, tmp_path / "out", "--revision=refs/pr/3").returncode == 0


def test_serve_takes_a_revision(hub: Hub, tmp_path: Path) -> None:
    hub.branch = "refs/pr/3"
    options = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), free_ports(3), strict=True)]
    options += [f"--checkpoint={hub.repo_id}@refs/pr/3", f"--cache-dir={tmp_path / 'cache'}", "--health-port=0"]
    command = [python("tools"), "-m", "serving", *options, "--", "--no-such-option-of-triton"]
    variables = {**hub_environment(hub, tmp_path), "PYTHONPATH": str(ROOT / "scripts")}
    # It does not start: the fetch comes first, and then Triton refuses.
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert (tmp_path / "cache" / f"{hub.repo_id}@refs--pr--3" / UNET).is_file(), run.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(
    number: int, hub: Hub, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fetching.fcntl, "flock", refuse)
    assert fetch(hub, tmp_path / "out").returncode == 0

"""Fetching from a stand-in for the hub: whole or not at all, resumed where it was cut, one line for each error."""

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path

import pytest

from checkpoints import hub as fetching
from environments import python
from hub_fetching import Fetch, assert_refused, contents, hub_environment
from hub_stand_in import Hub
from namespaces import in_namespace
from project import ROOT

SCRIPT = ROOT / "scripts" / "checkpoint"
FULL_DISK = ROOT / "tests" / "support" / "full_disk.py"
UNET = "unet/diffusion_pytorch_model.safetensors"


def test_fetches_all_but_pickles(hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for extra in ("unet/diffusion_pytorch_model.bin", "vae/vae.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (hub.directory / extra).write_bytes(b"x" * 1000)
    (hub.directory / "README.md").write_text("read me")
    out = tmp_path / "out"
    result = subprocess.run(
        [SCRIPT, "fetch", hub.repo_id, "--out", out],
        env=hub_environment(hub, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"OK: {out}: {hub.repo_id} at {hub.sha}\n"
    fetched = contents(out)
    revision = json.loads(fetched.pop("revision.json"))
    assert revision == {"repo_id": hub.repo_id, "revision": "main", "sha": hub.sha, "variant": ""}
    assert fetched == contents(tiny_checkpoint)
    asked = {name for name, _ in hub.ranges}
    assert asked == set(fetched)
    assert not out.with_name("out.partial").exists()
    # Once more: nothing to do.
    hub.sent.clear()
    assert fetch(hub, out).returncode == 0
    assert not hub.sent.keys() - {""}


def test_goes_on_where_it_was_cut(hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path) -> None:
    size, cut = (hub.directory / UNET).stat().st_size, 1_000_000
    hub.cut_after[UNET] = cut
    out = tmp_path / "out"
    assert_refused(fetch(hub, out), out, hub.repo_id, "no connection", "fetch again")
    assert hub.sent[UNET] == cut
    before = set(hub.sent) - {"", UNET}
    hub.cut_after.clear()
    hub.sent.clear()
    result = fetch(hub, out)
    assert result.returncode == 0, result.stderr
    assert hub.sent[UNET] == size - cut
    assert not before & set(hub.sent)
    assert contents(out)[UNET] == contents(tiny_checkpoint)[UNET]


def test_short_cuts_do_not_even_show(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    size = (hub.directory / UNET).stat().st_size
    hub.cut_each[UNET] = size // 3 + 1
    out = tmp_path / "out"
    result = fetch(hub, out)
    assert result.returncode == 0, result.stderr
    assert hub.sent[UNET] == size
    assert [start for name, start in hub.ranges if name == UNET] == [0, size // 3 + 1, 2 * (size // 3 + 1)]


def test_server_without_ranges_sends_from_the_start(
    hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    hub.cut_after[UNET] = 1_000_000
    out = tmp_path / "out"
    assert_refused(fetch(hub, out), out, "fetch again")
    hub.cut_after.clear()
    hub.knows_ranges = False
    assert fetch(hub, out).returncode == 0
    assert contents(out)[UNET] == contents(tiny_checkpoint)[UNET]


def test_stalled_connection_is_given_up_and_taken_up_again(
    hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_TIMEOUT", 3.0)
    hub.stall_once[UNET] = 1_000_000
    out = tmp_path / "out"
    result = fetch(hub, out)
    assert result.returncode == 0, result.stderr
    assert [start for name, start in hub.ranges if name == UNET] == [0, 1_000_000]
    assert contents(out)[UNET] == contents(tiny_checkpoint)[UNET]


def test_killed_process_leaves_no_checkpoint(hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path) -> None:
    size, sent = (hub.directory / UNET).stat().st_size, 1_000_000
    hub.stall_once[UNET] = sent
    out, unfinished = tmp_path / "out", tmp_path / "out.partial" / (UNET + ".unfinished")
    process = subprocess.Popen(
        [python("product"), "-m", "checkpoints", "fetch", hub.repo_id, "--out", out],
        env=hub_environment(hub, tmp_path) | {"PYTHONPATH": str(SCRIPT.parent)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    # What is not yet written when a process is killed is fetched again.
    while not (unfinished.exists() and unfinished.stat().st_size > sent // 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    present = unfinished.stat().st_size
    assert 0 < present <= sent
    hub.released.set()
    hub.sent.clear()
    result = fetch(hub, out)
    assert result.returncode == 0, result.stderr
    assert (UNET, present) in hub.ranges
    assert hub.sent[UNET] >= size - present
    assert contents(out)[UNET] == contents(tiny_checkpoint)[UNET]


@pytest.mark.parametrize("left", [b"?" * 1_000_000, b"?" * 20_000_000])  # shorter and longer than the file
def test_rubbish_in_the_unfinished_file_does_not_stay(
    hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path, left: bytes
) -> None:
    hub.cut_after[UNET] = 1_000_000
    out, unfinished = tmp_path / "out", tmp_path / "out.partial" / (UNET + ".unfinished")
    assert fetch(hub, out).returncode == 1
    hub.cut_after.clear()
    unfinished.write_bytes(left)
    result = fetch(hub, out)
    if result.returncode:
        assert_refused(result, out, UNET, "hash", "fetch again")
        assert fetch(hub, out).returncode == 0
    assert contents(out)[UNET] == contents(tiny_checkpoint)[UNET]


def test_new_commit_is_not_mixed_with_the_old(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.cut_after[UNET] = 1_000_000
    out = tmp_path / "out"
    assert fetch(hub, out).returncode == 1
    hub.cut_after.clear()
    hub.sha = "f" * 40
    weights = hub.directory / UNET
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert fetch(hub, out).returncode == 0
    assert (out / UNET).read_bytes() == weights.read_bytes()
    assert json.loads((out / "revision.json").read_text())["sha"] == "f" * 40


@pytest.mark.parametrize("name", [UNET, "vae/config.json"])
def test_damaged_file_is_noticed(hub: Hub, fetch: Fetch, tmp_path: Path, name: str) -> None:
    hub.corrupt.add(name)
    out = tmp_path / "out"
    assert_refused(fetch(hub, out), out, name, "hash")
    assert not (tmp_path / "out.partial" / name).exists()


def test_token_is_sent_to_the_hub(hub: Hub, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    out = tmp_path / "out"
    assert_refused(fetch(hub, out), out, hub.repo_id, "401", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch(hub, out).returncode == 0
    assert hub.cdn_tokens == {None}  # and to nobody else


def test_gated(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.gated = True
    assert_refused(fetch(hub, tmp_path / "out"), tmp_path / "out", hub.repo_id, "403", "HF_TOKEN")


def test_no_such_repository_or_revision(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(fetch(hub, out, "--revision", "v9"), out, hub.repo_id, "'v9'")
    hub.repo_id = "someone/else"
    other = Hub(hub.directory, repo_id="nobody/nothing", url=hub.url)
    assert_refused(fetch(other, out), out, "nobody/nothing", "404")


def test_renamed_repository_is_followed(hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path) -> None:
    hub.old_repo_id = "someone/audioldm-2"
    renamed = Hub(hub.directory, repo_id=hub.old_repo_id, url=hub.url)
    result = fetch(renamed, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out")[UNET] == contents(tiny_checkpoint)[UNET]


def test_file_that_is_listed_but_not_there(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.gone.add(UNET)
    assert_refused(fetch(hub, tmp_path / "out"), tmp_path / "out", hub.repo_id, "404", UNET)


@pytest.mark.parametrize("status", [403, 404, 503])
def test_refusal_by_the_storage_is_not_blamed_on_the_repository(
    hub: Hub, fetch: Fetch, tmp_path: Path, status: int
) -> None:
    hub.refused[UNET] = status
    out = tmp_path / "out"
    result = fetch(hub, out)
    assert_refused(result, out, hub.repo_id, f"storage at localhost answered {status}", "fetch again")
    assert "terms" not in result.stderr
    hub.refused.clear()
    assert fetch(hub, out).returncode == 0


def test_empty_answers_end(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.refused[UNET] = 206
    assert_refused(fetch(hub, tmp_path / "out"), tmp_path / "out", UNET, "empty response")


def test_hub_that_is_down(fetch: Fetch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model_index.json").write_text("{}")
    nobody = Hub(tmp_path, url="http://127.0.0.1:9")
    assert_refused(fetch(nobody, out), out, "no connection", "http://127.0.0.1:9")


def test_incomplete_repository_is_not_taken_for_a_checkpoint(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    shutil.rmtree(hub.directory / "vocoder")
    assert_refused(fetch(hub, tmp_path / "out"), tmp_path / "out", "vocoder")


def test_directory_in_use_is_left_alone(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    result = fetch(hub, out)
    assert result.returncode == 1
    assert str(out) in result.stderr
    assert contents(out) == {"mine": b"x"}


def test_disk_that_is_too_small_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=999))
    file = fetching._File("unet/config.json", "unet/config.json", 1000, None, None)
    with pytest.raises(OSError, match="expected") as raised:
        fetching._check_space(tmp_path, [file])
    assert raised.value.errno == errno.ENOSPC
    assert fetching._explain(raised.value, "a/b", "main").startswith(f"disk full: {tmp_path}: ")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json.unfinished").write_bytes(b"x")
    fetching._check_space(tmp_path, [file])  # what is there needs no room


def test_disk_that_fills_up_under_way(hub: Hub, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On a small file system of its own, which is made larger after the first attempt."""
    disk = tmp_path / "disk"
    disk.mkdir()
    total = sum(path.stat().st_size for path in tiny_checkpoint.rglob("*") if path.is_file())
    command = [*in_namespace("--mount"), python("product"), FULL_DISK, disk, str(total - 1_000_000), hub.repo_id]
    pythonpath = {"PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run(
        command, env=hub_environment(hub, tmp_path) | pythonpath, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["codes"] == [1, 0], result.stderr
    assert not report["whole_after_first"]
    lines = [line for line in result.stderr.splitlines() if line.startswith("checkpoint: ")]
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint: disk full: ")
    assert "Traceback" not in result.stderr
    # Resumed in the middle of the file that did not fit, and whole.
    assert any(start not in (0, 1_000_000) for _, start in hub.ranges)
    assert report["hashes"] == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents(tiny_checkpoint).items()
    }


def test_two_at_once(tmp_path: Path) -> None:
    with fetching._claimed(tmp_path), pytest.raises(fetching.FetchError, match="another"), fetching._claimed(tmp_path):
        pass

"""Fetching from a stand-in for the hub: whole or not at all, resumed where it was cut, one line for each error."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from checkpoints import hub as fetching
from checkpoints.__main__ import main
from environments import python
from hub_stand_in import Hub, serve
from namespaces import in_namespace
from project import ROOT

SCRIPT = ROOT / "scripts" / "checkpoint"
FULL_DISK = ROOT / "tests" / "support" / "full_disk.py"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))
    with serve(Hub(directory)) as running:
        yield running


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


Fetch = Callable[..., Result]


@pytest.fixture
def fetch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fetch:
    """The command, in this process: the libraries take seconds to import."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(fetching, "time", SimpleNamespace(sleep=lambda _: None))  # nobody waits between attempts

    def run(hub: Hub, out: Path, *arguments: str) -> Result:
        # What HF_ENDPOINT sets when the library is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        code = main(["fetch", hub.repo_id, "--out", str(out), *arguments])
        return Result(code, *capsys.readouterr())

    return run


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
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


def test_fetches_all_but_pickles(hub: Hub, fetch: Fetch, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for extra in ("unet/diffusion_pytorch_model.bin", "vae/vae.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (hub.directory / extra).write_bytes(b"x" * 1000)
    (hub.directory / "README.md").write_text("read me")
    out = tmp_path / "out"
    result = subprocess.run(
        [SCRIPT, "fetch", hub.repo_id, "--out", out],
        env=environment(hub, tmp_path),
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
    arguments = [f"--checkpoint={hub.repo_id}@refs/pr/3", f"--cache-dir={tmp_path / 'cache'}", "--dtype=float8"]
    command = [python("tools"), "-m", "serving", *arguments]
    variables = {**environment(hub, tmp_path), "PYTHONPATH": str(ROOT / "scripts")}
    # It does not start: the fetch comes first, and then a setting that it refuses.
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
    monkeypatch.setattr(fetching, "_TIMEOUT", 0.5)
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
        env=environment(hub, tmp_path) | {"PYTHONPATH": str(SCRIPT.parent)},
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


def test_weights_that_are_only_pickled(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    (hub.directory / "vae" / "diffusion_pytorch_model.safetensors").rename(hub.directory / "vae" / "model.bin")
    assert_refused(fetch(hub, tmp_path / "out"), tmp_path / "out", "vae/model.bin")
    assert not hub.ranges


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
        command, env=environment(hub, tmp_path) | pythonpath, capture_output=True, text=True, check=False
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

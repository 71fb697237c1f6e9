"""A stand-in for the hub, and the command that fetches from it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from checkpoints import hub as fetching
from checkpoints.__main__ import main
from hub_fetching import Fetch, Result
from hub_stand_in import Hub, serve


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))
    with serve(Hub(directory)) as running:
        yield running


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

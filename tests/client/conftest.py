"""A Triton with a model that stands in for AudioLDM 2, and where the command runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from contract_stand_in.stand_in_server import StandInServer, stand_in_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInServer]:
    with stand_in_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: StandInServer) -> str:
    """The command's option for the server."""
    return f"--url={request.param}://{getattr(server, request.param)}"


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

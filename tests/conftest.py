"""Fixtures: a tiny checkpoint, a real server on it, and the reference pipeline on the same weights."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before anything imports torch: idle OpenMP threads that spin take the cores from the server's processes. And servers
# would measure how many threads to use; the number decides the last bits of a product.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whoever starts the suite with Ctrl-C or SIGHUP ignored (a shell's background job, nohup, some CI) would have every
# program that is tested ignore it too: programs inherit that.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# Tests reach servers on this machine with clients that obey http_proxy: curl, plain tritonclient, urllib. What must
# work without this is tested without it.
for variable in ("no_proxy", "NO_PROXY"):
    os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "localhost,127.0.0.1,::1"]))

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent / "scripts"), str(TESTS / "support")]

from project import ROOT, add_stages_to_path  # noqa: E402

add_stages_to_path()

if TYPE_CHECKING:
    # A machine that only runs the tests of a GPU has neither a client nor a server.
    from audioldm2_pipeline import Reference
    from serving.local_server import LocalServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with long tests first: a worker that is given one at the end would work alone."""
    items.sort(key=lambda item: item.path.parent.name not in ("service", "commands", "trials"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    # By this Python: a machine that only runs the tests of a GPU has no other environment.
    command = [sys.executable, "-m", "checkpoints", "build", "tiny", f"--out={path}"]
    paths = os.pathsep.join([str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True)
    return path


@pytest.fixture(scope="module")
def fault_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LocalServer]":
    from plain_requests import ADMIN_KEY
    from serving.local_server import local_server

    log = tmp_path_factory.mktemp("server") / "log"
    with local_server(tiny_checkpoint, log, f"--admin-key={ADMIN_KEY}") as running:
        yield running


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> "Reference":
    from audioldm2_pipeline import Reference

    return Reference(tiny_checkpoint)

"""The two commands of the README pass, whoever starts them and however. `.ci/run` adds a clone with an awkward path."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import soundfile

from project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NOBODY = "http://127.0.0.1:9"  # the port `discard`, which is closed
# Signals, terminals, and whoever asks an address of this machine: what the starter's circumstances can break.
SENSITIVE = ("-k", "ctrl_c or interrupt or sigterm or light or proxy or example or curl or port_in_use")
FILES = (
    "tests/client/test_client_cli.py",
    "tests/client/test_client_playing.py",
    "tests/client/test_client_stream.py",
    "tests/service/test_readme.py",
    "tests/commands/test_serve.py",
)


@dataclass(frozen=True)
class Circumstances:
    prefix: tuple[str, ...] = ()  # of the command line
    variables: dict[str, str] = field(default_factory=dict)
    in_the_background: bool = False  # of a shell, which has its jobs ignore Ctrl-C
    umask: int = -1  # as it is
    busy_loops: int = 0


CIRCUMSTANCES = {
    "nohup": Circumstances(("nohup",), in_the_background=True),
    "setsid": Circumstances(("setsid", "--wait"), in_the_background=True),
    "empty environment": Circumstances(("env", "-i", f"PATH={os.environ['PATH']}", f"HOME={os.environ['HOME']}")),
    "dead proxy": Circumstances(
        variables={
            name: NOBODY
            for lower in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
            for name in (lower, lower.upper())
        }
    ),
    "restrictive umask": Circumstances(umask=0o077),
    "niced on a busy machine": Circumstances(("nice",), busy_loops=2),
}


@contextmanager
def busy_loop() -> Iterator[None]:
    # It ends with this process, however that ends.
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(circumstances: Circumstances, log: Path, *command: str | Path) -> str:
    """The output of a command that must succeed."""
    words = [*circumstances.prefix, *map(str, command)]
    if circumstances.in_the_background:
        words = ["sh", "-c", f"{shlex.join(words)} & wait $!"]
    unwanted = ("no_proxy", "NO_PROXY")  # of tests/conftest.py
    variables = {name: value for name, value in os.environ.items() if name not in unwanted}
    with ExitStack() as stack:
        for _ in range(circumstances.busy_loops):
            stack.enter_context(busy_loop())
        output = stack.enter_context(log.open("w"))
        process = subprocess.run(
            words,
            cwd=ROOT,
            env={**variables, **circumstances.variables},
            umask=circumstances.umask,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    assert process.returncode == 0, log.read_text()[-5000:]
    return log.read_text()


@pytest.fixture(params=CIRCUMSTANCES.values(), ids=CIRCUMSTANCES)
def circumstances(request: pytest.FixtureRequest) -> Circumstances:
    chosen: Circumstances = request.param
    return chosen


def test_the_quickstart_works(circumstances: Circumstances, tmp_path: Path) -> None:
    run(circumstances, tmp_path / "log", ROOT / "scripts" / "quickstart", "--out", tmp_path)
    assert soundfile.info(tmp_path / "out.wav").duration > 1
    assert (tmp_path / "out.png").exists()


def test_the_suite_passes(circumstances: Circumstances, tmp_path: Path) -> None:
    said = run(circumstances, tmp_path / "log", ROOT / "scripts" / "test", "-n", "0", "-q", *SENSITIVE, *FILES)
    assert " passed" in said


def test_a_shell_s_background_job_ignores_ctrl_c() -> None:
    """What `in_the_background` is for."""
    code = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    job = shlex.join([sys.executable, "-c", code])
    for background, expected in (("&", "True"), (";", "False")):
        command = ["env", "--default-signal=INT", "sh", "-c", f"{job} {background} wait"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{expected}\n"

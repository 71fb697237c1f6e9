"""What the command does with `--play`, with programs that stand in for players."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from audioldm2_triton.cli import main
from command_line_client import PROMPT
from environments import environment

pytestmark = pytest.mark.usefixtures("own_directory")


def player(folder: Path, name: str, script: str) -> None:
    """Makes a program with the name of a player. There is neither a player nor a loudspeaker on a machine for tests."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_first_player_plays_the_best(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = 'for last; do :; done; cat "$last" >>'
    player(Path("bin"), "ffplay", f'{heard} ffplay; echo "$@" >>arguments')
    player(Path("bin"), "aplay", f"{heard} aplay")
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:/usr/bin:/bin")
    request = [PROMPT, url, "--seed=7", "--num-waveforms-per-prompt=2", "--play"]
    assert main([*request, "-o=out.wav"]) == 0
    assert Path("ffplay").read_bytes() == Path("out.wav").read_bytes()
    assert Path("arguments").read_text().startswith("-nodisp -autoexit -loglevel error /")
    assert not Path("aplay").exists()
    # In whatever format the file is.
    assert main([*request, "-o=out.flac"]) == 0
    assert Path("ffplay").read_bytes() == 2 * Path("out.wav").read_bytes()


def test_several_sounds_are_played_one_after_another(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    player(Path("bin"), "ffplay", "mkdir playing || exit 1; sleep 0.1; rmdir playing; echo >>played")
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:/usr/bin:/bin")
    assert main([PROMPT, url, "--seed=1..4", "--play"]) == 0
    assert Path("played").read_text() == 4 * "\n"


def test_no_player_is_found_before_the_generation(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(Path().absolute()))
    assert main([f"!watch {Path('seen').absolute()}", url, "--play"]) == 1
    error = "audioldm2: --play: got no player on PATH but expected one of ffplay, aplay, paplay, afplay\n"
    assert capsys.readouterr().err == error
    assert not Path("seen").exists(), "the server has had a request"


def test_a_player_that_fails_is_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    player(Path("bin"), "ffplay", "printf 'ffplay: audio open error:\n no such device\n' >&2; exit 3")
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:/usr/bin:/bin")
    assert main([PROMPT, url, "--play"]) == 1
    error = f"audioldm2: {Path('bin/ffplay').absolute()}: exit code 3: ffplay: audio open error: no such device\n"
    assert capsys.readouterr().err == error
    assert Path("out.wav").exists()


def test_ctrl_c_stops_the_player(url: str) -> None:
    player(Path("bin"), "ffplay", "echo $$ >playing; exec sleep 60")
    command = [environment("client") / "bin" / "audioldm2", PROMPT, url, "--play"]
    variables = {**os.environ, "PATH": f"{Path('bin').absolute()}:/usr/bin:/bin"}
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (Path("playing").exists() and Path("playing").read_text().endswith("\n")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "audioldm2: interrupted\n"
    assert not Path(f"/proc/{Path('playing').read_text().strip()}").exists()

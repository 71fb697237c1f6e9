"""The files that the command writes: their formats, a pipe, and making a sound again by its file."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audioldm2_triton import contract
from audioldm2_triton.audio.encoding import FORMATS
from audioldm2_triton.audio.origin import read_origin
from audioldm2_triton.cli import main
from command_line_client import PROMPT, report
from contract_stand_in.stand_in_server import StandInServer
from environments import environment

pytestmark = pytest.mark.usefixtures("own_directory")


@pytest.mark.parametrize("fault", ["raise ImportError('none')", "raise OSError('cannot load libsndfile.so')"])
def test_only_files_other_than_wav_need_libsndfile(fault: str, url: str) -> None:
    Path("soundfile.py").write_text(fault)
    code = "import sys; from audioldm2_triton.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [environment("client") / "bin" / "python3", "-c", code, *arguments, url]
        path = os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
        )

    assert (run(PROMPT, "--seed=7").returncode, run("--like=out.wav", "-o=again.wav").returncode) == (0, 0)
    assert Path("again.wav").read_bytes() == Path("out.wav").read_bytes()
    for arguments in ([f"!watch {Path('seen').absolute()}", "-o=out.flac"], ["a", "b", "-o=d", "--audio-format=mp3"]):
        refused = run(*arguments)
        assert refused.returncode == 1
        assert refused.stderr.startswith("audioldm2: audio files other than WAV need the package soundfile, and libs")
    assert not Path("seen").exists(), "the server has had a request"


@pytest.mark.parametrize("name", sorted({each.suffix for each in FORMATS.values()}))
def test_the_suffix_chooses_the_format(name: str, url: str) -> None:
    assert main([PROMPT, url, f"-o=out{name}"]) == 0
    info = soundfile.info(f"out{name}")
    assert (info.format, info.subtype) == next(
        (each.container, each.subtype) for each in FORMATS.values() if each.suffix == name
    )


def test_a_pipe_gets_the_file_and_nothing_else(url: str) -> None:
    command = [environment("client") / "bin" / "audioldm2", PROMPT, url, "--seed=7", "-o", "-"]
    for name in ("wav", "flac24"):
        run = subprocess.run([*command, f"--audio-format={name}"], capture_output=True, timeout=60)
        assert run.returncode == 0, run.stderr
        assert main([PROMPT, url, "--seed=7", f"--audio-format={name}"]) == 0
        assert run.stdout == Path(f"out{FORMATS[name].suffix}").read_bytes()
        assert report(run.stderr.decode().rstrip())["path"] == "-"


def test_a_terminal_gets_no_file(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(SystemExit) as caught:
        main([PROMPT, url, "-o", "-"])
    assert caught.value.code == 2
    assert "-o -: got a terminal but expected a pipe or a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", contract.AUDIO_FORMATS)
def test_a_file_makes_its_sound_again(name: str, server: StandInServer) -> None:
    """The stand-in's audio depends on the seed and the other arguments."""
    url = f"--url=grpc://{server.grpc}"
    suffix = FORMATS[name].suffix
    request = ["雨 rain", "--audio-length-in-s=1.93", "--num-inference-steps=7", "--num-waveforms-per-prompt=3"]
    assert main([*request, url, f"-o=first{suffix}", f"--audio-format={name}"]) == 0
    for file in ("first", "first-2"):
        again = [f"--like={file}{suffix}", url, f"-o=again{suffix}", f"--audio-format={name}"]
        assert main(again) == 0
        read = [soundfile.read(f"{each}{suffix}")[0] for each in (file, "again")]
        np.testing.assert_array_equal(*read)
        assert not Path(f"again-1{suffix}").exists()
    assert not np.array_equal(soundfile.read(f"first{suffix}")[0], read[0])


def test_other_options_replace_what_a_file_says(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PROMPT, url, "--seed=7", "--audio-length-in-s=0.5", "--num-waveforms-per-prompt=2"]) == 0
    assert main(["--like=out-1.wav", url, "-o=b.wav", "--seed=8"]) == 0
    lines = [report(line) for line in capsys.readouterr().out.splitlines()]
    # It is another request, whose best is not the file's.
    assert [line["path"] for line in lines] == ["out.wav", "out-1.wav", "b.wav", "b-1.wav"]
    assert {(line["seed"], line["length"]) for line in lines} == {("7", "0.50"), ("8", "0.50")}
    assert main(["wind", "--like=out.wav", url, "-o=c.wav"]) == 0
    assert read_origin(Path("c.wav").read_bytes()).arguments["prompt"] == "wind"


def test_another_checkpoint_is_a_word_not_an_error(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PROMPT, url]) == 0
    content = Path("out.wav").read_bytes()
    Path("other.wav").write_bytes(content.replace(b'"stand-in"', b'"standing"'))
    assert main(["--like=other.wav", url]) == 0
    error = capsys.readouterr().err
    assert error == "audioldm2: other.wav was made with standing, but the server has stand-in\n"


def test_files_that_cannot_be_like(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write("recorded.wav", np.zeros(100), 16000)
    for name, complaint in {
        "recorded.wav": "audioldm2: recorded.wav: `file`: got '' but expected a file whose comment is audioldm2-triton",
        "no.wav": "audioldm2: [Errno 2] No such file or directory: 'no.wav'",
    }.items():
        assert main([f"--like={name}", url]) == 1
        assert capsys.readouterr().err.startswith(complaint)

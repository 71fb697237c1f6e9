"""The command line against a real Triton, with a model that stands in for AudioLDM 2."""

import json
import os
import pty
import re
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
import soundfile

from audioldm2_triton import contract
from audioldm2_triton.cli import main
from audioldm2_triton.options import build_parser
from audioldm2_triton.transport.wire import GenerateOptions
from command_line_client import PROMPT, report
from contract_stand_in.stand_in_audio import NATIVE_AUDIO_LENGTH_IN_S
from environments import environment

pytestmark = pytest.mark.usefixtures("own_directory")


def test_a_prompt_becomes_a_file_and_a_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PROMPT, url, "--seed=7", "--audio-length-in-s=1.93"]) == 0
    assert soundfile.info("out.wav").duration == 1.93
    captured = capsys.readouterr()
    assert report(captured.out.rstrip("\n")) == {"path": "out.wav", "length": "1.93", "seed": "7", "score": "-"}
    assert captured.err == ""


def test_several_waveforms_are_numbered_from_the_best(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PROMPT, url, "-o=some.flac", "--num-waveforms-per-prompt=3", "--plot=best.png"]) == 0
    reports = [report(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["path"] for item in reports] == ["some.flac", "some-1.flac", "some-2.flac"]
    assert [item["score"] for item in reports] == ["0.9000", "0.5000", "0.1000"]
    assert all(soundfile.info(item["path"]).format == "FLAC" for item in reports)
    assert Path("best.png").exists()


def installed(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in an environment that has the client's dependencies alone."""
    command = [environment("client") / "bin" / "audioldm2", *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)


def installed_as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same without root's right to write everywhere."""
    command = [environment("client") / "bin" / "audioldm2", *arguments]
    if os.getuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_light_client_is_enough(url: str) -> None:
    Path("prompts.txt").write_text("rain\nwind\n")
    made = installed("--batch=prompts.txt", "-o=made", url, "--num-waveforms-per-prompt=2")
    assert (made.returncode, made.stderr) == (0, "")
    assert len(list(Path("made").iterdir())) == 4
    assert "16000 Hz" in installed("--info", url).stdout
    refused = installed(PROMPT, url, "--plot=out.png")
    assert refused.returncode == 1
    assert "pip install matplotlib" in refused.stderr


def test_the_page_says_what_it_needs() -> None:
    run = installed("web")
    error = "audioldm2: plots need matplotlib: pip install matplotlib\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, "", error)
    assert installed("web", "--no-such-option").returncode == 2


def test_a_server_on_this_machine_is_reached_without_the_proxy(url: str) -> None:
    dead = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    for arguments in ([PROMPT], ["--batch=prompts.txt", "-o=made"], ["--info"]):
        Path("prompts.txt").write_text("rain\n")
        run = installed(*arguments, url, no_proxy="", NO_PROXY="", **dead)
        assert (run.returncode, run.stderr) == (0, "")


def test_a_proxy_on_the_way_is_named_without_its_password() -> None:
    proxy = "http://user:secret@127.0.0.1:9"
    variables = {"http_proxy": proxy, "https_proxy": "", "grpc_proxy": "", "no_proxy": "", "NO_PROXY": ""}
    run = installed("--info", "--url=grpc://192.0.2.1:8001", "--max-retries=0", "--timeout=30", **variables)
    assert run.returncode == 1
    assert run.stderr.startswith("audioldm2: grpc://192.0.2.1:8001: ")
    assert "(http_proxy is set, and gRPC uses that proxy unless no_proxy excepts the host)" in run.stderr
    assert "secret" not in run.stderr


def test_more_waveforms_than_a_server_makes_touch_no_file(url: str) -> None:
    # The refusal is the server's; the stand-in, which has no limit, runs out of memory at once.
    assert main([PROMPT, url, "--num-waveforms-per-prompt=1000000000"]) == 1
    assert list(Path().iterdir()) == []


def test_every_argument_of_a_request_has_an_option() -> None:
    arguments = build_parser().parse_args([PROMPT])
    not_for_people = {"return_scores", "request_id"}
    assert set(GenerateOptions.__annotations__) - not_for_people <= set(vars(arguments))
    defaults = {name: getattr(arguments, name) for name in ("num_inference_steps", "guidance_scale")}
    assert defaults == {
        "num_inference_steps": contract.DEFAULT_NUM_INFERENCE_STEPS,
        "guidance_scale": contract.DEFAULT_GUIDANCE_SCALE,
    }


def test_the_priority_is_the_batchs_only_if_none_is_given(url: str) -> None:
    Path("prompts.txt").write_text("wind\n")
    assert main(["--batch=prompts.txt", "-o=made", url, "--seed=3", "--priority=interactive"]) == 0
    assert main(["wind", url, "--seed=3"]) == 0
    assert Path("out.wav").read_bytes() == Path("made/0001.wav").read_bytes()


def test_a_batch_goes_on_after_a_failure(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("\ufeffrain\n\n  wind \r\n!fail INVALID_ARG `prompt`: got no\nsea", encoding="utf-8")
    assert main(["--batch=prompts.txt", "-o=made/here", url, "--seed=3"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "audioldm2: line 4: `prompt`: got no\n"
    assert {report(line)["path"] for line in captured.out.splitlines()} == {
        f"made/here/{number}.wav" for number in ("0001", "0003", "0005")
    }
    assert len(list(Path("made/here").iterdir())) == 3
    # Each is what a call of its own gives; nobody waits for a batch.
    assert main(["wind", url, "--seed=3", "--priority=batch"]) == 0
    assert Path("out.wav").read_bytes() == Path("made/here/0003.wav").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROMPT, "-o=a.wav"], "Is a directory: 'a.wav'"),
        ([PROMPT, f"-o={'a' * 300}.wav"], "File name too long"),
        ([PROMPT, "-o=closed/b.wav"], "Permission denied: 'closed/b.wav'"),
        ([PROMPT, "-o=some.wav", "--num-waveforms-per-prompt=3"], "Is a directory: 'some-2.wav'"),
        (["--batch=prompts.txt", "-o=closed"], "Permission denied: 'closed/0001.wav'"),
        (["--batch=prompts.txt", "-o=made"], "Is a directory: 'made/0002.wav'"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_generation(arguments: list[str], message: str, url: str) -> None:
    for folder in ("a.wav", "some-2.wav", "closed", "made/0002.wav"):
        Path(folder).mkdir(parents=True)
    Path("prompts.txt").write_text(f"!watch {Path('seen').absolute()}\nrain\n")
    Path("closed").chmod(0o500)
    before = sorted(Path().rglob("*"))
    run = installed_as_nobody(*[f"!watch {Path('seen').absolute()}" if a == PROMPT else a for a in arguments], url)
    assert (run.returncode, run.stdout) == (1, "")
    assert message in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not Path("seen").exists(), "the server has had a request"
    assert sorted(Path().rglob("*")) == before


def test_a_picture_that_cannot_be_drawn_is_found_before_the_generation(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("picture.png").mkdir()
    assert main([f"!watch {Path('seen').absolute()}", url, "--plot=picture.png"]) == 1
    assert "Is a directory: 'picture.png'" in capsys.readouterr().err
    assert not Path("seen").exists()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_that_lacks_letters(encoding: str, url: str) -> None:
    Path("prompts.txt").write_text("雨\nwind\n", encoding="utf-8")
    run = installed("--batch=prompts.txt", "-o=生成", url, PYTHONIOENCODING=encoding)
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(file.name for file in Path("生成").iterdir()) == ["0001.wav", "0002.wav"]
    assert "\\u751f\\u6210/0001.wav" in run.stdout
    assert installed(PROMPT, url, "-o=鐘.wav", PYTHONIOENCODING=encoding).returncode == 0


def test_prompts_from_standard_input(url: str) -> None:
    command = [environment("client") / "bin" / "audioldm2", "--batch", "-", "-o=made", url]
    run = subprocess.run(command, input=b"rain\nbell\n", capture_output=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, b"")
    assert len(list(Path("made").iterdir())) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_prompts_in_another_encoding_are_refused(encoding: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_bytes("rain\nf\xfcr Elise\n".encode(encoding))
    assert main(["--batch=prompts.txt", "-o=made", url]) == 1
    assert "`--batch`: got 'prompts.txt' but expected text in UTF-8" in capsys.readouterr().err
    assert not Path("made").exists()


def test_seeds_are_variations(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PROMPT, url, "--seed=3..5", "-o=a.flac"]) == 0
    lines = [report(line) for line in capsys.readouterr().out.splitlines()]
    assert {(line["path"], line["seed"]) for line in lines} == {(f"a-seed{seed}.flac", str(seed)) for seed in (3, 4, 5)}
    assert main([PROMPT, url, "--seed=4", "-o=b.flac", "--priority=batch"]) == 0
    assert Path("b.flac").read_bytes() == Path("a-seed4.flac").read_bytes()


def test_several_prompts_are_numbered(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "rain",
        "!fail INVALID_ARG `prompt`: got no",
        "-o=made",
        "wind",
        url,
        "--seed=1..2",
        "--audio-format=ogg",
    ]
    assert main(command) == 1
    assert sorted(path.name for path in Path("made").iterdir()) == [
        f"{number}-seed{seed}.ogg" for number in ("0001", "0003") for seed in (1, 2)
    ]
    assert set(capsys.readouterr().err.splitlines()) == {
        f"audioldm2: prompt 2, seed {seed}: `prompt`: got no" for seed in (1, 2)
    }


def test_json_for_scripts(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PROMPT, url, "--json", "--seed=7", "--num-waveforms-per-prompt=2", "--audio-length-in-s=0.5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line.pop("latency_in_s") >= 0 for line in lines)
    common = {"prompt": PROMPT, "length_in_s": 0.5, "seed": 7}
    assert lines == [
        {"path": "out.wav", "waveform": 0, "score": 0.9, **common},
        {"path": "out-1.wav", "waveform": 1, "score": 0.1, **common},
    ]
    assert main([url, "--json", "--info"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["checkpoint"], info["limits"]["max_num_waveforms_per_prompt"]) == ("stand-in", 4)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("audioldm2 --num-w", {"--num-waveforms-per-prompt"}),
        ("audioldm2 --priority b", {"batch"}),
        ("audioldm2 rain --audio-format wav", {"wav", "wav24", "wavfloat"}),
        ("audioldm2 --batch pro", {"prompts.txt"}),
    ],
)
def test_a_shell_completes(typed: str, offered: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Bash itself runs what is printed, as it does after TAB."""
    Path("prompts.txt").touch()
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 0
    Path("completion").write_text(capsys.readouterr().out)
    script = """
    . ./completion
    read -ra COMP_WORDS <<<"$1"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $(complete -p audioldm2 | sed 's/.*-F \\([^ ]*\\).*/\\1/') audioldm2 "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    run = subprocess.run(["bash", "-c", script, "bash", typed], capture_output=True, text=True)
    assert set(run.stdout.split()) == offered, run.stderr


def test_a_batch_keeps_several_requests_in_flight(url: str) -> None:
    Path("prompts.txt").write_text("!meet 4\n" * 8)
    # Each is answered only when four of them are in flight.
    assert main(["--batch=prompts.txt", "-o=made", url, "--concurrency=4"]) == 0


def test_info(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--info", url]) == 0
    lines = capsys.readouterr().out
    for expected in (
        "stand-in",
        f"{NATIVE_AUDIO_LENGTH_IN_S:g} s",
        "16000 Hz",
        "audioldm2, music_audioldm2",
        "30 s",
        "100",
        *contract.SCHEDULERS[:3],
    ):
        assert expected in lines


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["!fail INVALID_ARG `seed`: got -1 but expected more"], "`seed`: got -1 but expected more"),
        (["!raise"], "audioldm2_stream_0 failed: ValueError: an exception out of execute()"),
        (
            [PROMPT, "-o=out.aac"],
            "`--output`: got 'out.aac' but expected a file name ending in .wav, .flac, .ogg, .opus or .mp3",
        ),
        ([PROMPT, "-o=no/out.wav"], "`--output`: got 'no/out.wav' but expected a file in an existing directory"),
        ([PROMPT, "--plot=out.gif"], "`--plot`: got 'out.gif' but expected a file name ending in .png"),
        ([PROMPT, "--num-inference-steps=9999999999"], "`num_inference_steps`: got 9999999999 but expected an integer"),
        ([PROMPT, "--timeout=-1"], "`timeout`: got -1.0 but expected a positive number of seconds"),
        (["!sleep 9", "--timeout=0.1"], "deadline exceeded: 100000 us"),
        (["--batch=no.txt", "-o=made"], "[Errno 2] No such file or directory: 'no.txt'"),
        (["--batch=/dev/null", "-o=made"], "`--batch`: got '/dev/null' but expected at least one line with a prompt"),
    ],
)
def test_errors_are_one_line(
    url: str, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"audioldm2: {complaint}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[PROMPT], ["--batch=prompts.txt", "-o=made"], ["--info"]])
def test_a_server_that_is_not_there_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a\nb\n")
    assert main([*arguments, "--url=grpc://localhost:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("audioldm2: grpc://localhost:1: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [PROMPT, "--info"],
        [PROMPT, "--batch=prompts.txt", "-o=made"],
        ["--batch=prompts.txt"],
        ["--batch=prompts.txt", "-o=made", "--plot=out.png"],
        ["--batch=prompts.txt", "-o=made", "--concurrency=0"],
        [PROMPT, "--guidance-scale=much"],
        [PROMPT, "--no-such-option"],
        ["rain", "wind"],
        ["rain", "wind", "-o=-"],
        [PROMPT, "--seed=1..2", "-o=-"],
        [PROMPT, "--seed=1..2", "--plot=out.png"],
        [PROMPT, "--seed=2..1"],
        [PROMPT, "--seed=1..99999"],
        [PROMPT, "--seed=1..x"],
        [PROMPT, "--audio-format=aac"],
    ],
)
def test_wrong_command_lines_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: audioldm2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["!watch {}", "--num-inference-steps=7"], r"step 1/7 [\d:]+, [\d:]+ left"),
        (["--batch=prompts.txt", "-o=made"], r"1/3 \[[\d:]+<[\d:]+"),
    ],
)
def test_a_terminal_shows_a_bar_and_ctrl_c_cancels_on_the_server(
    url: str, arguments: list[str], shown: str, tmp_path: Path
) -> None:
    watch = tmp_path / "seen"
    Path("prompts.txt").write_text(f"!watch {watch}\nrain\n!sleep 20\n")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [environment("client") / "bin" / "audioldm2", *(item.format(watch) for item in arguments), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        seen = ""
        while not re.search(shown, seen):
            seen += os.read(ours, 1024).decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    while True:
        try:
            seen += os.read(ours, 1024).decode()
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert "Traceback" not in seen
    assert "rror" not in seen
    assert "audioldm2: interrupted" in seen
    # A batch over HTTP is of plain requests, which are stopped only by their deadline.
    if "http" in url and "--batch=prompts.txt" in arguments:
        return
    deadline = time.monotonic() + 10
    while not (watch.exists() and watch.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert watch.read_text() == "cancelled"


def test_a_server_without_the_stream_serves_all_the_same(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "stream_of", lambda _: "another")
    assert main([PROMPT, url, "--seed=7"]) == 0
    assert report(capsys.readouterr().out.rstrip("\n"))["seed"] == "7"

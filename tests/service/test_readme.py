"""The examples of the README and of the contract page, run as they stand, on the test server's ports."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile

from environments import python
from plain_requests import on_test_ports
from project import ROOT
from serving.local_server import LocalServer

PAGES = [(ROOT / name).read_text() for name in ("README.md", "model_repository/README.md")]


def code_blocks(language: str) -> list[str]:
    return [code for page in PAGES for code in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]


@pytest.mark.parametrize("code", code_blocks("python"), ids=["client", "tritonclient", "grpcio"])
def test_python_examples(code: str, server: LocalServer, tmp_path: Path) -> None:
    run = subprocess.run(
        [python("client"), "-c", on_test_ports(code, server)], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if "rain.wav" in code:
        assert soundfile.info(tmp_path / "rain.wav").frames == 5 * 16000
        assert run.stdout.rstrip().endswith(" 0")
    else:
        assert run.stdout.startswith(("(163840,) 16000 ", "(8, 163840)"))


@pytest.mark.parametrize(("waveforms", "passes"), [pytest.param("6", True, marks=pytest.mark.slow), ("7", False)])
def test_grpc_s_own_limit_is_the_one_described(waveforms: str, passes: bool, server: LocalServer) -> None:
    """Without the option of the page the same code fails, at the page's number of waveforms and not below."""
    (code,) = (code for code in code_blocks("python") if "max_receive_message_length" in code)
    unlimited = '("grpc.max_receive_message_length", -1)'
    assert unlimited in code
    limited = on_test_ports(code.replace(unlimited, ""), server)
    fewer = limited.replace("[8]", f"[{waveforms}]").replace("reshape(8", f"reshape({waveforms}")
    run = subprocess.run([python("client"), "-c", fewer], capture_output=True, text=True)
    assert (run.returncode == 0) is passes, run.stderr
    assert passes or "RESOURCE_EXHAUSTED" in run.stderr


def test_curl_returns_audio(server: LocalServer) -> None:
    command = next(code for code in code_blocks("bash") if code.startswith("curl") and "audio_format" not in code)
    run = subprocess.run(["bash", "-c", on_test_ports(command, server)], capture_output=True, text=True, check=True)
    answer = json.loads(run.stdout)
    assert len(answer["audio"]) == 2 * 16000
    assert 0.01 < max(map(abs, answer["audio"])) <= 1
    assert answer["seed_used"] == 0
    assert answer["sampling_rate"] == 16000


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_curl_returns_a_file(server: LocalServer, tmp_path: Path) -> None:
    (command,) = (code for code in code_blocks("bash") if "audio_format" in code)
    subprocess.run(["bash", "-euo", "pipefail", "-c", on_test_ports(command, server)], cwd=tmp_path, check=True)
    assert soundfile.info(tmp_path / "out.wav").duration == 10.24

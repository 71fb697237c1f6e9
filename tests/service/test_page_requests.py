"""What `audioldm2 web` does with a request, without its page: texts to copy, options, files, a cancellation, HTML."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from audioldm2_triton import (
    AsyncAudioLDM2Client,
    AudioLDM2Client,
    InvalidArgumentError,
    Progress,
    RequestCancelledError,
)
from audioldm2_triton.audio.origin import read_origin
from audioldm2_triton.server_info import ServerInfo
from audioldm2_triton.web.controls import ranges, read_options
from audioldm2_triton.web.gallery import show_error, show_history, show_progress
from audioldm2_triton.web.generation import Candidate, Generated, Runs, generate
from audioldm2_triton.web.request_texts import request_texts
from environments import environment, python
from metrics_page import is_idle, read_metrics, wait_for_metrics
from plain_requests import on_test_ports
from serving.local_server import LocalServer

PROMPT: Final = 'it\'s "raining" on $HOME \\ 雨'
OPTIONS: Final[dict[str, Any]] = {
    "negative_prompt": "- '",
    "audio_length_in_s": 0.64,
    "num_inference_steps": 2,
    "num_waveforms_per_prompt": 2,
    "seed": 7,
    "scheduler": "DDIMScheduler",
}


@pytest.fixture(scope="module")
def info(server: LocalServer) -> ServerInfo:
    with AudioLDM2Client(server.grpc_url) as client:
        return client.server_info()


@pytest.fixture(scope="module")
def expected(server: LocalServer) -> np.ndarray:
    with AudioLDM2Client(server.grpc_url) as client:
        return client.generate(PROMPT, **OPTIONS).audio[0]


@pytest.mark.parametrize("name", ["python", "command", "curl"])
def test_a_text_to_copy_makes_the_sound(name: str, server: LocalServer, expected: np.ndarray, tmp_path: Path) -> None:
    if name == "curl" and not (shutil.which("curl") and shutil.which("jq")):
        pytest.skip("needs curl and jq")
    texts = request_texts("grpc://localhost:8001", "audioldm2", PROMPT, OPTIONS)
    # The command leaves out the default URL, which is not the test's.
    texts = replace(texts, command=request_texts(server.grpc_url, "audioldm2", PROMPT, OPTIONS).command)
    (tmp_path / "text").write_text(on_test_ports(getattr(texts, name), server))
    program = [python("client")] if name == "python" else ["bash", "-euo", "pipefail"]
    path = os.pathsep.join([str(environment("client") / "bin"), os.environ["PATH"]])
    subprocess.run([*program, "text"], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=120)
    heard = soundfile.read(tmp_path / "out.wav", dtype="float32")[0]
    assert np.abs(heard - np.clip(expected, -1, 1)).max() <= 2.0**-15
    assert read_origin((tmp_path / "out.wav").read_bytes()).arguments["seed"] == 7


def test_texts_of_a_request_with_defaults() -> None:
    texts = request_texts("https://host/path/", "audioldm2", "rain", {})
    assert texts.command == "audioldm2 rain --url=https://host/path/"
    assert texts.curl.startswith("curl -s https://host/path/v2/models/audioldm2/generate \\\n")
    assert "jq -r .encoded_audio |" in texts.curl.replace("'", "")
    for prompt in ("web", "--info"):
        assert request_texts("grpc://localhost:8001", "audioldm2", prompt, {}).command == f"audioldm2 -- {prompt}"
    texts = request_texts("grpc://h:9", "m_audioldm2", 'a "b"', {})
    assert "generate(\n        'a \"b\"'," in texts.python
    assert 'AudioLDM2Client("grpc://h:9", model="m_audioldm2")' in texts.python
    assert "http://h:8000/v2/models/m_audioldm2/" in texts.curl


def test_controls_have_the_servers_limits(info: ServerInfo) -> None:
    limited = replace(info, limits=replace(info.limits, max_num_inference_steps=50, max_num_waveforms_per_prompt=3))
    by_name = {each.name: each for each in ranges(limited)}
    assert (by_name["num_inference_steps"].high, by_name["num_waveforms_per_prompt"].high) == (50, 3)
    assert by_name["audio_length_in_s"].default == info.native_audio_length_in_s
    assert by_name["audio_length_in_s"].high == info.limits.max_audio_length_in_s


def test_options_are_what_differs_from_the_defaults(info: ServerInfo) -> None:
    untouched = {
        "negative_prompt": "",
        "seed": " ",
        "scheduler": info.schedulers[0],
        **{each.name: each.default for each in ranges(info)},
    }
    assert read_options(info, untouched) == {}
    touched = read_options(info, {**untouched, "num_inference_steps": 7.0, "seed": "9007199254740993"})
    assert touched == {"num_inference_steps": 7, "seed": 2**53 + 1}
    assert all(isinstance(value, int) for value in touched.values())
    with pytest.raises(InvalidArgumentError, match="`seed`: got 'x' but expected an integer"):
        read_options(info, {**untouched, "seed": "x"})
    # Where the server publishes no length, the one that is shown is sent.
    unknown = replace(info, native_audio_length_in_s=None)
    shown = {each.name: each.default for each in ranges(unknown)}
    assert read_options(unknown, {**untouched, **shown}) == {"audio_length_in_s": 10.0}


async def rest(events: AsyncGenerator[Progress | Generated, None]) -> list[Progress | Generated]:
    return [event async for event in events]


def test_a_request_becomes_files(server: LocalServer, expected: np.ndarray, tmp_path: Path) -> None:
    async def run() -> list[Progress | Generated]:
        async with AsyncAudioLDM2Client(server.grpc_url) as client:
            return await rest(Runs().follow("a", generate(client, PROMPT, OPTIONS, tmp_path)))

    *steps, generated = asyncio.run(run())
    assert steps == [Progress(1, 2), Progress(2, 2)]
    assert isinstance(generated, Generated)
    assert (generated.options, generated.length_in_s, len(generated.candidates)) == (OPTIONS, 0.64, 2)
    best, second = generated.candidates
    assert best.score is not None
    assert second.score is not None
    assert best.score >= second.score
    heard = soundfile.read(best.sound, dtype="float32")[0]
    assert np.abs(heard - np.clip(expected, -1, 1)).max() <= 2.0**-15
    assert all(each.picture.read_bytes().startswith(b"\x89PNG") for each in generated.candidates)


@pytest.mark.parametrize("way", ["cancel", "again", "close"])
def test_a_request_that_is_ended_leaves_the_engine(way: str, server: LocalServer, tmp_path: Path) -> None:
    """By the button, by another request of the same session, or because nobody reads on."""
    cancelled = 'audioldm2_requests_total{engine="cpu",model="denoiser",outcome="cancelled"}'
    before = read_metrics(server)[cancelled]
    runs = Runs()

    async def run() -> None:
        async with AsyncAudioLDM2Client(server.grpc_url) as client:
            options = {"num_inference_steps": 200, "scheduler": "HeunDiscreteScheduler"}
            long = runs.follow("a", generate(client, "rain", options, tmp_path))
            async with contextlib.aclosing(long):
                assert isinstance(await anext(long), Progress)
                if way == "close":
                    return
                if way == "cancel":
                    await runs.cancel("b")  # another session's
                    assert isinstance(await anext(long), Progress)
                    await runs.cancel("a")
                else:
                    short = await rest(runs.follow("a", generate(client, PROMPT, OPTIONS, tmp_path)))
                    assert isinstance(short[-1], Generated)
                with pytest.raises(RequestCancelledError):
                    await rest(long)

    asyncio.run(run())
    wait_for_metrics(server, lambda page: page[cancelled] == before + 1 and is_idle(page), "a cancelled request")


def test_an_error_is_in_the_servers_words(server: LocalServer, tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncAudioLDM2Client(server.grpc_url) as client:
            await rest(Runs().follow("a", generate(client, " ", {}, tmp_path)))

    with pytest.raises(InvalidArgumentError, match="`prompt`: got ' ' but expected"):
        asyncio.run(run())


def test_what_is_shown_is_well_formed() -> None:
    prompt = '<script>alert("1")</script> & more'
    candidate = Candidate(Path("/tmp/a.wav"), Path("/tmp/a.png"), 0.25)
    history = [
        Generated(each, {"seed": 7}, 2.56, (candidate, replace(candidate, score=None))) for each in ("old", prompt)
    ]
    shown = show_history(history)
    root = ElementTree.fromstring(f"<html>{shown}</html>")
    assert [each.text for each in root.iter("h2")] == [prompt, "old"]
    assert [each.get("src") for each in root.iter("audio")] == 4 * ["gradio_api/file=/tmp/a.wav"]
    assert all(prompt in (each.get("alt") or "") for each in list(root.iter("img"))[:2])
    captions = ["".join(each.itertext()) for each in root.iter("figcaption")]
    assert captions[:2] == ["candidate 1 of 2, score 0.2500, download", "candidate 2 of 2, download"]
    assert "&lt;script&gt;" in show_error(ValueError(prompt))
    assert 'max="12" value="3"' in show_progress(Progress(3, 12))

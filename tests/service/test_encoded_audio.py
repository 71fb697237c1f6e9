"""Audio as the bytes of files, for callers without Python: in all ways to call a server, the same sound."""

import base64
import io
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from audioldm2_triton import contract
from audioldm2_triton.audio.encoding import FORMATS
from audioldm2_triton.audio.origin import read_origin
from audioldm2_triton.cli import main
from plain_requests import infer_inputs, streamed
from serving.local_server import LocalServer

REQUEST = {
    "prompt": "rain",
    "audio_length_in_s": 0.64,
    "num_inference_steps": 2,
    "num_waveforms_per_prompt": 2,
    "seed": 7,
}


def inputs(**more: str) -> dict[str, list[Any]]:
    request = {**REQUEST, **more}
    return {name: [value.encode() if isinstance(value, str) else value] for name, value in request.items()}


def infer(module: Any, port: int, rows: dict[str, list[Any]]) -> Any:
    with module.InferenceServerClient(f"localhost:{port}") as client:
        return client.infer(contract.ENSEMBLE, infer_inputs(module, rows))


def post(server: LocalServer, path: str, body: dict[str, Any]) -> bytes:
    url = f"{server.http_url}/v2/models/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def samples(server: LocalServer) -> np.ndarray:
    """[N, S], best first, as floats."""
    answer = infer(grpc, server.grpc_port, inputs())
    assert answer.as_numpy("encoded_audio").tolist() == [[b"", b""]]
    return answer.as_numpy("audio")[0]


def assert_holds(files: list[bytes], name: str, samples: np.ndarray) -> None:
    assert len(files) == len(samples)
    for rank, (content, expected) in enumerate(zip(files, samples, strict=True)):
        info = soundfile.info(io.BytesIO(content))
        assert (info.format, info.subtype) == (FORMATS[name].container, FORMATS[name].subtype)
        read = soundfile.read(io.BytesIO(content), dtype="float32")[0]
        assert read.shape == expected.shape
        if name in ("wav", "wav24", "wavfloat", "flac", "flac24"):
            np.testing.assert_allclose(read, expected, atol=2.0**-15)
        else:
            # Noise is what random weights make, of which a lossy codec keeps little more than its strength.
            assert np.std(read) == pytest.approx(np.std(expected), rel=0.5)
        origin = read_origin(content)
        assert origin.waveform == rank
        assert origin.checkpoint is not None
        assert {name: origin.arguments[name] for name in REQUEST} == REQUEST


@pytest.mark.parametrize("name", contract.AUDIO_FORMATS)
def test_grpc_has_bytes(name: str, server: LocalServer, samples: np.ndarray) -> None:
    answer = infer(grpc, server.grpc_port, inputs(audio_format=name))
    assert answer.as_numpy("audio").shape == (1, 2, 0)
    assert answer.as_numpy("score").shape == (1, 2)
    assert_holds(answer.as_numpy("encoded_audio")[0].tolist(), name, samples)


def test_http_has_bytes(server: LocalServer, samples: np.ndarray) -> None:
    answer = infer(http, server.http_port, inputs(audio_format="flac"))
    assert_holds(answer.as_numpy("encoded_audio")[0].tolist(), "flac", samples)


def test_json_has_base64(server: LocalServer, samples: np.ndarray) -> None:
    answer = json.loads(post(server, "audioldm2/generate", {**REQUEST, "audio_format": "flac;base64"}))
    assert answer["audio"] == []
    assert_holds([base64.b64decode(text) for text in answer["encoded_audio"]], "flac", samples)


def test_a_stream_ends_with_the_files(server: LocalServer, samples: np.ndarray) -> None:
    *others, last = streamed(server, inputs(audio_format="wav"))
    assert [set(other) for other in others] == [{"step", "num_steps"}] * 2
    assert_holds(last["encoded_audio"][0].tolist(), "wav", samples)
    whole = infer(grpc, server.grpc_port, inputs(audio_format="wav"))
    assert last["encoded_audio"].tolist() == whole.as_numpy("encoded_audio").tolist()


def test_a_stream_of_events_ends_with_the_files(server: LocalServer, samples: np.ndarray) -> None:
    events = post(server, "audioldm2_stream/generate_stream", {**REQUEST, "audio_format": "wav;base64"}).decode()
    last = json.loads(events.strip().split("\n\n")[-1].removeprefix("data: "))
    assert_holds([base64.b64decode(text) for text in last["encoded_audio"]], "wav", samples)


def test_a_file_alone_may_be_asked_for(server: LocalServer) -> None:
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        wanted = [grpc.InferRequestedOutput("encoded_audio")]
        answer = client.infer(contract.ENSEMBLE, infer_inputs(grpc, inputs(audio_format="ogg")), outputs=wanted)
    assert [output.name for output in answer.get_response().outputs] == ["encoded_audio"]


def test_prompts_of_one_request_have_their_own_files(server: LocalServer) -> None:
    rows = {name: values * 2 for name, values in inputs(audio_format="wav").items()} | {
        "prompt": [b"rain", "雨".encode()]
    }
    files = infer(grpc, server.grpc_port, rows).as_numpy("encoded_audio")
    assert [[read_origin(content).arguments["prompt"] for content in row] for row in files] == [
        ["rain"] * 2,
        ["雨"] * 2,
    ]


def test_the_command_makes_the_sound_of_a_servers_file_again(server: LocalServer, tmp_path: Path) -> None:
    files = infer(grpc, server.grpc_port, inputs(audio_format="wav")).as_numpy("encoded_audio")[0]
    for rank, content in enumerate(files):
        made = tmp_path / f"{rank}.wav"
        made.write_bytes(content)
        assert main([f"--like={made}", f"--url={server.grpc_url}", f"-o={tmp_path / 'again.wav'}"]) == 0
        again = soundfile.read(tmp_path / "again.wav", dtype="int16")[0]
        np.testing.assert_array_equal(again, soundfile.read(made, dtype="int16")[0])


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (b"[]", "`audio_file`: got b'[]' but expected what the text stage sends"),
        (b"text", "`audio_file`: got b'text' but expected what the text stage sends"),
        (b'{"audio_format": "wav", "as_base64": false, "arguments": {}}', "expected what the text stage sends"),
        (b'{"audio_format": "aac", "as_base64": false, "arguments": {}}', "`audio_format`: got 'aac' but expected one"),
    ],
)
def test_a_decoder_called_directly_refuses_what_it_cannot_read(
    content: bytes, refused: str, server: LocalServer
) -> None:
    def tensor(name: str, kind: str, array: np.ndarray) -> grpc.InferInput:
        made = grpc.InferInput(name, array.shape, kind)
        made.set_data_from_numpy(array)
        return made

    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        text = client.infer("text_conditioning", infer_inputs(grpc, inputs()))
        given = {name: text.as_numpy(name) for name in ("num_samples", "return_scores", "text_embeds")}
        kinds = {"num_samples": "INT32", "return_scores": "BOOL", "text_embeds": "FP32"}
        tensors = [tensor(name, kinds[name], array) for name, array in given.items()]
        tensors.append(tensor("latents", "FP32", np.zeros((1, 1, 8, 16, 16), np.float32)))
        tensors.append(tensor("audio_file", "UINT8", np.frombuffer(content, np.uint8)[None]))
        with pytest.raises(InferenceServerException, match=re.escape(refused)):
            client.infer("decoder", tensors)

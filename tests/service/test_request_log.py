"""Each request has one line in the server's log, with its id: done, or why it failed, by every way."""

import json
import urllib.request

import numpy as np
import pytest
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from audioldm2_triton import AudioLDM2Client, InvalidArgumentError
from serving.local_server import LocalServer
from supervised_server import wait_until

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SHORT = {"audio_length_in_s": 0.2, "num_inference_steps": 1}


def lines(server: LocalServer, request_id: str) -> list[str]:
    return [line for line in server.log.read_text(errors="replace").splitlines() if f"'{request_id}'" in line]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("prompt", ["rain", ["rain"]], ids=["stream", "ensemble"])
def test_one_line_says_how_a_request_ended(prompt: str | list[str], protocol: str, server: LocalServer) -> None:
    name = f"{protocol}-{type(prompt).__name__}"
    with AudioLDM2Client(server.grpc_url if protocol == "grpc" else server.http_url) as client:
        client.generate(prompt, **SHORT, request_id=f"good-{name}")
        with pytest.raises(InvalidArgumentError):
            client.generate(prompt, **SHORT, scheduler="Euler", request_id=f"bad-{name}")
    wait_until(lambda: lines(server, f"good-{name}") and lines(server, f"bad-{name}"), "the lines")
    (good,), (bad,) = lines(server, f"good-{name}"), lines(server, f"bad-{name}")
    assert f"request 'good-{name}' is done" in good
    for known in (
        "outcome='success'",
        "prompts=1",
        "waveforms=1",
        "steps=1",
        "audio_seconds=0.2",
        "denoising_seconds=",
    ):
        assert f" {known}" in good
    assert "traceparent" not in good
    assert ("first_audio_seconds=" in good) == (protocol == "grpc" and isinstance(prompt, str))
    assert f"request 'bad-{name}' failed: InvalidArgumentError: `scheduler`: got 'Euler'" in bad


def text(prompt: str) -> grpc.InferInput:
    tensor = grpc.InferInput("prompt", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[prompt]], object))
    return tensor


@pytest.mark.parametrize("model", ["text_conditioning", "denoiser", "decoder", "audioldm2"])
def test_the_header_of_a_trace_reaches_every_stage(model: str, server: LocalServer) -> None:
    """Each refuses the request itself, `audioldm2` in its first one."""
    client, name = grpc.InferenceServerClient(f"localhost:{server.grpc_port}"), f"traced-{model}"
    deadline = grpc.InferInput("deadline_ns", [1, 1], "INT64")
    deadline.set_data_from_numpy(np.zeros((1, 1), np.int64))
    given = deadline if model in ("denoiser", "decoder") else text(" ")
    with pytest.raises(InferenceServerException, match="expected"):
        client.infer(model, [given], request_id=name, headers={"traceparent": TRACE})
    (line,) = wait_until(lambda: lines(server, name), "the line")
    assert f" traceparent='{TRACE}'" in line


def test_over_http_too(server: LocalServer) -> None:
    client = http.InferenceServerClient(f"localhost:{server.http_port}")
    tensor = http.InferInput("prompt", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[" "]], object))
    with pytest.raises(InferenceServerException, match="expected"):
        client.infer("audioldm2", [tensor], request_id="traced-http", headers={"Traceparent": TRACE})
    (line,) = wait_until(lambda: lines(server, "traced-http"), "the line")
    assert f" traceparent='{TRACE}'" in line


@pytest.mark.parametrize("path", ["audioldm2/generate", "audioldm2_stream/generate_stream"])
def test_the_trace_may_be_a_parameter(path: str, server: LocalServer) -> None:
    """These endpoints pass on no header."""
    name = f"traced-{path}"
    body = json.dumps({"prompt": "rain", **SHORT, "id": name, "traceparent": TRACE}).encode()
    request = urllib.request.Request(f"{server.http_url}/v2/models/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
    (line,) = wait_until(lambda: lines(server, name), "the line")
    assert f" traceparent='{TRACE}'" in line
    assert " decoding_seconds=" in line


@pytest.mark.parametrize("url", ["grpc_url", "http_url"])
def test_a_prompt_that_is_refused_is_not_in_the_log(url: str, server: LocalServer) -> None:
    secret = f"{url}secret" * 500
    with AudioLDM2Client(getattr(server, url)) as client, pytest.raises(InvalidArgumentError, match=f"{url}secret"):
        client.generate(secret, **SHORT, request_id=f"long-{url}")
    (line,) = wait_until(lambda: lines(server, f"long-{url}"), "the line")
    assert "`prompt`: got a text but expected at most 2000 characters" in line
    assert f"{url}secret" not in server.log.read_text(errors="replace")

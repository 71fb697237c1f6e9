"""The table of errors in `model_repository/README.md`: the status and the message of each cause, by every way."""

import http.client
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from audioldm2_triton.server.entrance import Entrance
from serving.local_server import LocalServer

FIELDS: Final = {"BYTES": "bytes_contents", "FP32": "fp32_contents", "INT32": "int_contents"}
Inputs = Mapping[str, tuple[str, Any]]  # type and value by name

RAIN: Final[Inputs] = {"prompt": ("BYTES", "rain"), "audio_length_in_s": ("FP32", 0.2)}
LONG: Final = {**RAIN, "num_inference_steps": ("INT32", 200)}


@pytest.fixture
def entrance(server: LocalServer) -> Entrance:
    (triton,) = [each for each in psutil.Process(server.process.pid).children() if each.name() == "tritonserver"]
    (repository,) = [word for word in triton.cmdline() if word.startswith("--model-repository=")]
    return Entrance(Path(repository.partition("=")[2]).parent)


def post(server: LocalServer, path: str, body: bytes) -> tuple[str, str]:
    connection = http.client.HTTPConnection("localhost", server.http_port, timeout=60)
    connection.request("POST", f"/v2/models/{path}", body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return str(answer.status), text


def message(model: str, inputs: Inputs, timeout: int) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, (kind, value) in inputs.items():
        given = value.encode() if isinstance(value, str) else value
        request.inputs.add(name=name, datatype=kind, shape=[1, 1], contents={FIELDS[kind]: [given]})
    if timeout:
        request.parameters["timeout"].int64_param = timeout
    return request


def by_every_way(server: LocalServer, inputs: Inputs, timeout: int = 0) -> dict[str, tuple[str, str]]:
    """The status and the message of a request, by each way."""
    parameters = {"timeout": timeout} if timeout else {}
    described = [
        {"name": name, "datatype": kind, "shape": [1, 1], "data": [value]} for name, (kind, value) in inputs.items()
    ]
    fields = json.dumps({name: value for name, (_, value) in inputs.items()} | parameters).encode()
    found = {
        "infer": post(server, "audioldm2/infer", json.dumps({"inputs": described, "parameters": parameters}).encode()),
        "generate": post(server, "audioldm2/generate", fields),
        "generate_stream": post(server, "audioldm2_stream/generate_stream", fields),
    }
    with grpc.insecure_channel(f"localhost:{server.grpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(message("audioldm2", inputs, timeout), timeout=60)
        found["gRPC"] = caught.value.code().name, caught.value.details()
        stream = stub.ModelStreamInfer(iter([message("audioldm2_stream", inputs, timeout)]), timeout=60)
        found["gRPC stream"] = "", next(each.error_message for each in stream if each.error_message)
    return found


def codes(found: Mapping[str, tuple[str, str]]) -> list[str]:
    return [found[way][0] for way in ("gRPC", "infer", "generate", "generate_stream")]


def assert_streams_say(found: Mapping[str, tuple[str, str]], words: str) -> None:
    assert found["gRPC stream"][1].startswith(words)
    assert f'"error":"{words}' in found["generate_stream"][1]


def test_a_refused_value(server: LocalServer) -> None:
    found = by_every_way(server, {**RAIN, "num_inference_steps": ("INT32", 0)})
    assert codes(found) == ["INVALID_ARGUMENT", "400", "400", "400"]
    assert_streams_say(found, "INVALID_ARG: `num_inference_steps`: got 0")


def test_no_prompt(server: LocalServer) -> None:
    found = by_every_way(server, {"audio_length_in_s": ("FP32", 0.2)})
    assert codes(found) == ["INVALID_ARGUMENT", "400", "400", "400"]


def test_a_wrong_type(server: LocalServer) -> None:
    found = by_every_way(server, {**RAIN, "num_inference_steps": ("FP32", 2.5)})
    assert codes(found) == ["INVALID_ARGUMENT", "400", "500", "500"]
    assert "INVALID_ARG" not in found["gRPC stream"][1]


def test_a_deadline(server: LocalServer) -> None:
    found = by_every_way(server, LONG, timeout=1000)
    assert codes(found) == ["CANCELLED", "400", "400", "400"]
    assert all("deadline exceeded" in said for _, said in found.values())
    assert_streams_say(found, "CANCELLED: deadline exceeded")


def test_a_full_server(server: LocalServer, entrance: Entrance) -> None:
    sign = entrance.full("denoiser")
    assert sign is not None
    sign.touch()
    try:
        found = by_every_way(server, RAIN)
    finally:
        sign.unlink()
    assert codes(found) == ["UNAVAILABLE", "503", "400", "400"]
    assert_streams_say(found, "UNAVAILABLE: denoiser is full")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("audioldm2/infer", b"{", "500"),
        ("audioldm2/generate", b"{", "500"),
        ("audioldm3/generate", b'{"prompt": "rain"}', "404"),
        ("audioldm3/infer", b'{"inputs": []}', "404"),
        ("audioldm2_stream/infer", b'{"inputs": []}', "501"),
        ("audioldm2_stream/generate", b'{"prompt": "rain", "audio_length_in_s": 0.2, "num_inference_steps": 1}', "200"),
    ],
)
def test_what_is_no_request_of_this_model(path: str, body: bytes, status: str, server: LocalServer) -> None:
    found = post(server, path, body)
    assert found[0] == status
    assert '"error":' in found[1]

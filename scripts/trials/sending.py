"""Sends a raw request by each way into Triton, and reads what kind of answer comes back."""

import http.client
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from audioldm2_triton.errors import InternalError, read_stream_message
from serving.local_server import LocalServer
from trials.hostile import Hostile, RawTensor

PATIENCE_IN_S: Final = 60.0
"""How long an answer may take before it counts as none."""

ANSWERED: Final = "answered"
REFUSED: Final = "refused"
INTERNAL: Final = "INTERNAL"
NONE: Final = "no answer"
LEFT_OUT: Final = "left out"  # because Triton itself dies of it, or the protocol cannot say it

# Triton before 25.06 allocates what the shape in a request's JSON says, and ends by std::bad_alloc: upstream #8174.
_TRITON_ALLOCATES: Final = 2**20
_HEADER_LENGTH: Final = "Inference-Header-Content-Length"
# Triton gives JSON that it cannot read, and values of a wrong kind, the status 500.
_TRITON_PARSING: Final = re.compile(r'{"error":"(Unable|[Ff]ailed) to parse ')
_NO_CONNECTION: Final = re.compile("connect|socket", re.IGNORECASE)  # gRPC's own words
_INTERNAL_CODES: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)


@dataclass(frozen=True)
class Answer:
    kind: str
    message: str = ""


class Ways:
    """The ways of one thread into a server."""

    def __init__(self, server: LocalServer) -> None:
        self._server = server
        self._channel = grpc.insecure_channel(
            f"localhost:{server.grpc_port}", [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0)]
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._connection = self._connect()

    def close(self) -> None:
        self._channel.close()
        self._connection.close()

    @property
    def all(self) -> Mapping[str, Callable[[Hostile], Answer]]:
        return {
            "gRPC": self.over_grpc,
            "gRPC stream": self.over_stream,
            "HTTP binary": self.in_binary,
            "HTTP JSON": self.in_json,
            "generate": self.by_generate,
        }

    def over_grpc(self, request: Hostile) -> Answer:
        try:
            self._stub.ModelInfer(_message(request), timeout=PATIENCE_IN_S)
        except grpc.RpcError as error:
            return _of_status(error)
        return Answer(ANSWERED)

    def over_stream(self, request: Hostile) -> Answer:
        message = _message(request)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        call = self._stub.ModelStreamInfer(iter([message]), timeout=PATIENCE_IN_S)
        answer = Answer(NONE, "the stream ended without a response")
        try:
            for response in call:
                if response.error_message:
                    internal = isinstance(read_stream_message(response.error_message), InternalError)
                    answer = Answer(INTERNAL if internal else REFUSED, response.error_message)
                elif answer.kind == NONE:
                    answer = Answer(ANSWERED)
        except grpc.RpcError as error:
            return _of_status(error)
        return answer

    def in_binary(self, request: Hostile) -> Answer:
        header = {**_json_header(request), "inputs": [_described(each) for each in request.tensors]}
        text = json.dumps(header).encode()
        body = text + b"".join(each.data for each in request.tensors)
        return self.post(_infer_path(request), body, {_HEADER_LENGTH: str(len(text))})

    def in_json(self, request: Hostile) -> Answer:
        if any(math.prod(map(abs, each.shape)) > _TRITON_ALLOCATES for each in request.tensors):
            return Answer(LEFT_OUT)
        inputs = [
            {"name": each.name, "datatype": each.datatype, "shape": each.shape, "data": each.values}
            for each in request.tensors
        ]
        return self.post(_infer_path(request), json.dumps({**_json_header(request), "inputs": inputs}).encode(), {})

    def by_generate(self, request: Hostile) -> Answer:
        body: dict[str, object] = {**request.parameters}
        for each in request.tensors:
            values = each.values
            body[each.name] = values[0] if isinstance(values, list) and len(values) == 1 else values
        stream = "_stream" if request.model.endswith("_stream") else ""
        return self.post(f"/v2/models/{quote(request.model)}/generate{stream}", json.dumps(body).encode(), {})

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            self._connection.request("POST", path, body, dict(headers))
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            self._connection = self._connect()
            return Answer(NONE, repr(error))
        text = content.decode(errors="replace")
        if response.status == 200:
            # An event stream has its error in an event.
            at = text.rfind('"error":"')
            if at < 0:
                return Answer(ANSWERED)
            internal = isinstance(read_stream_message(text[at + len('"error":"') :]), InternalError)
            return Answer(INTERNAL if internal else REFUSED, text[at:])
        internal = response.status == 500 and not _TRITON_PARSING.match(text)
        return Answer(INTERNAL if internal else REFUSED, f"{response.status} {text}")

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("localhost", self._server.http_port, timeout=PATIENCE_IN_S)


def _of_status(error: Any) -> Answer:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED or _NO_CONNECTION.search(error.details()):
        return Answer(NONE, error.details())
    kind = INTERNAL if error.code() in _INTERNAL_CODES else REFUSED
    return Answer(kind, f"{error.code().name} {error.details()}")


def _infer_path(request: Hostile) -> str:
    version = f"/versions/{quote(request.version)}" if request.version else ""
    return f"/v2/models/{quote(request.model)}{version}/infer"


def _json_header(request: Hostile) -> dict[str, Any]:
    header: dict[str, Any] = {"parameters": dict(request.parameters)}
    if request.request_id:
        header["id"] = request.request_id
    if request.outputs:
        header["outputs"] = [{"name": name} for name in request.outputs]
    return header


def _described(tensor: RawTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": tensor.shape,
        "parameters": {"binary_data_size": len(tensor.data)},
    }


def _message(request: Hostile) -> Any:
    message = service_pb2.ModelInferRequest(
        model_name=request.model, model_version=request.version, id=request.request_id
    )
    for each in request.tensors:
        message.inputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
        message.raw_input_contents.append(each.data)
    for name in request.outputs:
        message.outputs.add(name=name)
    for name, value in request.parameters.items():
        parameter = message.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        elif isinstance(value, float) and math.isfinite(value):
            parameter.double_param = value
        else:
            parameter.string_param = str(value)
    return message

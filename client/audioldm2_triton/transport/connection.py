"""The connections of the client for ordinary programs: `tritonclient`, and the streams that it lacks."""

import contextlib
import os
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any, Final

from tritonclient.utils import InferenceServerException

from audioldm2_triton import contract
from audioldm2_triton.transport import sse, wire
from audioldm2_triton.transport.endpoint import Endpoint
from audioldm2_triton.transport.forks import was_forked
from audioldm2_triton.transport.keepalive import keep_alive
from audioldm2_triton.transport.stream_reader import Tensors
from audioldm2_triton.transport.wire import InferRequest

PIECE: Final = 2**16  # bytes of an HTTP stream read at once, at most


class GrpcConnection:
    """One channel for single answers and one for streams, shared by all threads.

    The streams are our own: `tritonclient` has one per client, and leaves a thread behind when it is cancelled.
    """

    def __init__(self, endpoint: Endpoint, model: str, root_certificates: str | None) -> None:
        import grpc
        from tritonclient import grpc as triton

        self._model = model
        self._endpoint = endpoint
        self._input_class = triton.InferInput
        self._result_class = triton.InferResult
        options = endpoint.channel_options
        self._client = triton.InferenceServerClient(
            endpoint.address, ssl=endpoint.tls, root_certificates=root_certificates, channel_args=options
        )
        if endpoint.tls:
            trusted = None if root_certificates is None else Path(root_certificates).read_bytes()
            credentials = grpc.ssl_channel_credentials(trusted)
            self._channel = grpc.secure_channel(endpoint.address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(endpoint.address, options)
        self._stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        answer = self._client.get_model_config(
            self._model, headers=self._endpoint.headers, as_json=True, client_timeout=wire.client_timeout(timeout)
        )
        config: Mapping[str, Any] = answer["config"]
        return config

    def infer(self, request: InferRequest) -> Any:
        return self._client.infer(
            self._model,
            wire.infer_inputs(request, self._input_class),
            request_id=request.request_id,
            timeout=request.timeout_us,
            client_timeout=wire.client_timeout(request.timeout),
            headers=self._endpoint.headers,
        )

    def is_stream_ready(self, timeout: float | None) -> bool:
        return bool(
            self._client.is_model_ready(
                contract.stream_of(self._model),
                headers=self._endpoint.headers,
                client_timeout=wire.client_timeout(timeout),
            )
        )

    def stream(self, request: InferRequest) -> Generator[Tensors, None, None]:
        process = os.getpid()
        call = self._stub.ModelStreamInfer(
            iter([wire.stream_message(request, self._model)]),
            timeout=wire.client_timeout(request.timeout),
            metadata=tuple(self._endpoint.headers.items()),
        )
        try:
            for response in call:
                if response.error_message:
                    raise InferenceServerException(response.error_message)
                yield wire.grpc_tensors(self._result_class(response.infer_response))
        finally:
            if not was_forked(process):
                call.cancel()  # does nothing if it has ended

    def close(self) -> None:
        self._channel.close()
        self._client.close()


class HttpConnection:
    """One `tritonclient.http` per thread, because it is not thread-safe."""

    def __init__(self, endpoint: Endpoint, model: str, root_certificates: str | None) -> None:
        self._model = model
        self._endpoint = endpoint
        self._root_certificates = root_certificates
        self._local = threading.local()

    def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self._client(timeout).get_model_config(self._model, headers=self._endpoint.headers)
        return config

    def infer(self, request: InferRequest) -> Any:
        from tritonclient import http

        return self._client(request.timeout).infer(
            self._model,
            wire.infer_inputs(request, http.InferInput),
            request_id=request.request_id,
            timeout=request.timeout_us,
            headers=self._endpoint.headers,
        )

    def is_stream_ready(self, timeout: float | None) -> bool:
        return bool(
            self._client(timeout).is_model_ready(contract.stream_of(self._model), headers=self._endpoint.headers)
        )

    def stream(self, request: InferRequest) -> Generator[Tensors, None, None]:
        # `tritonclient.http` has no streams. Each gets its own connection; closing it is the cancellation.
        remaining = _countdown(wire.client_timeout(request.timeout))
        host, slash, base = self._endpoint.address.partition("/")
        with contextlib.closing(self._open_connection(host, next(remaining))) as connection:
            body = sse.request_body(request)
            connection.connect()
            keep_alive(connection.sock)
            connection.request(
                "POST", f"{slash}{base}{sse.path(self._model)}", body, {**sse.HEADERS, **self._endpoint.headers}
            )
            socket = connection.sock  # kept, because the connection drops it
            with connection.getresponse() as response:
                if response.status != 200:
                    raise sse.refusal(response.status, response.read())
                events = sse.EventStream()
                while piece := response.read1(PIECE):
                    yield from events.feed(piece)
                    socket.settimeout(next(remaining))

    def _open_connection(self, host: str, timeout: float | None) -> HTTPConnection:
        if not self._endpoint.tls:
            return HTTPConnection(host, timeout=timeout)
        context = ssl.create_default_context(cafile=self._root_certificates)
        return HTTPSConnection(host, timeout=timeout, context=context)

    def close(self) -> None:
        # Each thread's client closes itself when nothing refers to it.
        self._local = threading.local()

    def _client(self, timeout: float | None) -> Any:
        """Returns this thread's client. A timeout belongs to its connection, so another one needs a new connection."""
        from tritonclient import http

        if getattr(self._local, "timeout", -1) != timeout:
            network_timeout = wire.client_timeout(timeout)
            self._local.client = http.InferenceServerClient(
                self._endpoint.address,
                connection_timeout=network_timeout,
                network_timeout=network_timeout,
                ssl=self._endpoint.tls,
                ssl_options={"ca_certs": self._root_certificates} if self._root_certificates else None,
            )
            self._local.client._client_stub._connection_pool.after_connect = keep_alive
            self._local.timeout = timeout
        return self._local.client


def _countdown(timeout: float | None) -> Iterator[float | None]:
    """Yields how many of `timeout` seconds are left; None: unlimited. Raises `TimeoutError` when none are."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        yield left

"""The connections of the client for asyncio: `tritonclient`, and the streams that it lacks."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from audioldm2_triton import contract
from audioldm2_triton.transport import sse, wire
from audioldm2_triton.transport.endpoint import Endpoint
from audioldm2_triton.transport.keepalive import keep_alive_all
from audioldm2_triton.transport.stream_reader import Tensors
from audioldm2_triton.transport.wire import InferRequest

if TYPE_CHECKING:
    from aiohttp import ClientSession

T = TypeVar("T")


class AsyncGrpcConnection:
    def __init__(self, endpoint: Endpoint, model: str, root_certificates: str | None) -> None:
        from tritonclient.grpc import aio

        self._model = model
        self._endpoint = endpoint
        self._input_class = aio.InferInput
        self._client = aio.InferenceServerClient(
            endpoint.address,
            ssl=endpoint.tls,
            root_certificates=root_certificates,
            channel_args=endpoint.channel_options,
        )

    async def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        answer = await self._client.get_model_config(
            self._model, headers=self._endpoint.headers, as_json=True, client_timeout=wire.client_timeout(timeout)
        )
        config: Mapping[str, Any] = answer["config"]
        return config

    async def infer(self, request: InferRequest) -> Any:
        return await self._client.infer(
            self._model,
            wire.infer_inputs(request, self._input_class),
            request_id=request.request_id,
            timeout=request.timeout_us,
            client_timeout=wire.client_timeout(request.timeout),
            headers=self._endpoint.headers,
        )

    async def is_stream_ready(self, timeout: float | None) -> bool:
        return bool(
            await self._client.is_model_ready(
                contract.stream_of(self._model),
                headers=self._endpoint.headers,
                client_timeout=wire.client_timeout(timeout),
            )
        )

    async def stream(self, request: InferRequest) -> AsyncGenerator[Tensors, None]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": contract.stream_of(self._model),
                "inputs": wire.infer_inputs(request, self._input_class),
                "request_id": request.request_id,
                "timeout": request.timeout_us,
            }

        call = self._client.stream_infer(
            requests(), stream_timeout=wire.client_timeout(request.timeout), headers=self._endpoint.headers
        )
        try:
            async for result, error in call:
                if error is not None:
                    raise error
                yield wire.grpc_tensors(result)
        finally:
            call.cancel()  # does nothing if it has ended

    async def close(self) -> None:
        await self._client.close()


class AsyncHttpConnection:
    def __init__(self, endpoint: Endpoint, model: str, root_certificates: str | None) -> None:
        from tritonclient.http import aio

        self._model = model
        self._endpoint = endpoint
        self._scheme = "https" if endpoint.tls else "http"
        self._address = endpoint.address
        self._ssl = ssl.create_default_context(cafile=root_certificates) if endpoint.tls else True
        self._session: ClientSession | None = None  # for the streams, which `tritonclient.http` lacks
        self._input_class = aio.InferInput
        self._client = aio.InferenceServerClient(
            endpoint.address,
            # No limit on requests in flight, which is up to the caller, nor on the time, which is per request.
            conn_limit=0,
            conn_timeout=None,
            ssl=endpoint.tls,
            ssl_context=self._ssl,
        )
        keep_alive_all(self._client._conn)

    async def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        return await _within(timeout, self._client.get_model_config(self._model, headers=self._endpoint.headers))

    async def infer(self, request: InferRequest) -> Any:
        answer = self._client.infer(
            self._model,
            wire.infer_inputs(request, self._input_class),
            request_id=request.request_id,
            timeout=request.timeout_us,
            headers=self._endpoint.headers,
        )
        return await _within(request.timeout, answer)

    async def is_stream_ready(self, timeout: float | None) -> bool:
        return bool(
            await _within(
                timeout, self._client.is_model_ready(contract.stream_of(self._model), headers=self._endpoint.headers)
            )
        )

    async def stream(self, request: InferRequest) -> AsyncGenerator[Tensors, None]:
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        if self._session is None:
            connector = TCPConnector(ssl=self._ssl, limit=0)
            keep_alive_all(connector)
            self._session = ClientSession(connector=connector)
        response = await self._session.post(
            f"{self._scheme}://{self._address}{sse.path(self._model)}",
            data=sse.request_body(request),
            headers={**sse.HEADERS, **self._endpoint.headers},
            timeout=ClientTimeout(total=wire.client_timeout(request.timeout)),
        )
        try:
            if response.status != 200:
                raise sse.refusal(response.status, await response.read())
            events = sse.EventStream()
            async for piece in response.content.iter_any():
                for tensors in events.feed(piece):
                    yield tensors
        finally:
            response.close()  # and with it the connection, which is the cancellation

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self._client.close()


async def _within(timeout: float | None, answer: Awaitable[T]) -> T:
    return await asyncio.wait_for(answer, wire.client_timeout(timeout))

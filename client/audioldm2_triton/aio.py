"""The client for asyncio, the twin of `client`."""

import asyncio
import ssl
from collections.abc import Awaitable, Mapping, Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from audioldm2_triton import contract, wire
from audioldm2_triton.endpoint import DEFAULT_URL, Endpoint, parse_url
from audioldm2_triton.failures import known_failures
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.server_info import ServerInfo, read_server_info
from audioldm2_triton.wire import GenerateOptions, InferRequest, PerRow

if TYPE_CHECKING:
    from typing import Self, Unpack

T = TypeVar("T")


class AsyncAudioLDM2Client:
    """`AudioLDM2Client` for asyncio: the same arguments, results and errors. It belongs to one event loop."""

    def __init__(self, url: str = DEFAULT_URL, *, root_certificates: str | PathLike[str] | None = None) -> None:
        self._endpoint = parse_url(url)
        self._root_certificates = None if root_certificates is None else fspath(root_certificates)
        self._connection: _GrpcConnection | _HttpConnection | None = None
        self._info: ServerInfo | None = None
        self._closed = False

    async def __aenter__(self) -> "Self":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. Requests still running fail."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def server_info(self, timeout: float | None = None) -> ServerInfo:
        """As `AudioLDM2Client.server_info`."""
        wire.check_timeout(timeout)
        with known_failures(self._endpoint, timeout):
            config = await self._open().model_config(timeout)
        self._info = read_server_info(config)
        return self._info

    @overload
    async def generate(self, prompt: str, **options: "Unpack[GenerateOptions]") -> GenerationResult: ...  # type: ignore[overload-overlap]

    @overload
    async def generate(self, prompt: Sequence[str], **options: "Unpack[GenerateOptions]") -> list[GenerationResult]: ...

    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: PerRow[str | None] = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: PerRow[int] = contract.DEFAULT_NUM_INFERENCE_STEPS,
        guidance_scale: PerRow[float] = contract.DEFAULT_GUIDANCE_SCALE,
        num_waveforms_per_prompt: int = contract.DEFAULT_NUM_WAVEFORMS_PER_PROMPT,
        seed: PerRow[int | None] = None,
        scheduler: PerRow[str | None] = None,
        return_scores: PerRow[bool | None] = None,
        timeout: float | None = None,
        request_id: str = "",
    ) -> GenerationResult | list[GenerationResult]:
        """As `AudioLDM2Client.generate`."""
        request = wire.build_request(
            self._info or await self.server_info(timeout),
            prompt,
            negative_prompt=negative_prompt,
            audio_length_in_s=audio_length_in_s,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_waveforms_per_prompt=num_waveforms_per_prompt,
            seed=seed,
            scheduler=scheduler,
            return_scores=return_scores,
            timeout=timeout,
            request_id=request_id,
        )
        with known_failures(self._endpoint, timeout):
            answer = await self._open().infer(request)
        return wire.read_results(request, answer)

    def _open(self) -> "_GrpcConnection | _HttpConnection":
        """The connection, opened at the first call because it belongs to the running event loop."""
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._connection is None:
            open_connection = _GrpcConnection if self._endpoint.protocol == "grpc" else _HttpConnection
            self._connection = open_connection(self._endpoint, self._root_certificates)
        return self._connection


class _GrpcConnection:
    def __init__(self, endpoint: Endpoint, root_certificates: str | None) -> None:
        from tritonclient.grpc import aio

        self._input_class = aio.InferInput
        self._client = aio.InferenceServerClient(
            endpoint.address, ssl=endpoint.tls, root_certificates=root_certificates
        )

    async def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        answer = await self._client.get_model_config(
            contract.ENSEMBLE, as_json=True, client_timeout=wire.client_timeout(timeout)
        )
        config: Mapping[str, Any] = answer["config"]
        return config

    async def infer(self, request: InferRequest) -> Any:
        return await self._client.infer(
            contract.ENSEMBLE,
            wire.infer_inputs(request, self._input_class),
            request_id=request.request_id,
            timeout=request.timeout_us,
            client_timeout=wire.client_timeout(request.timeout),
        )

    async def close(self) -> None:
        await self._client.close()


class _HttpConnection:
    def __init__(self, endpoint: Endpoint, root_certificates: str | None) -> None:
        from tritonclient.http import aio

        self._input_class = aio.InferInput
        self._client = aio.InferenceServerClient(
            endpoint.address,
            # Neither a limit on what is in flight, which is the caller's, nor on the time, which is per request.
            conn_limit=0,
            conn_timeout=None,
            ssl=endpoint.tls,
            ssl_context=ssl.create_default_context(cafile=root_certificates) if endpoint.tls else True,
        )

    async def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        return await _within(timeout, self._client.get_model_config(contract.ENSEMBLE))

    async def infer(self, request: InferRequest) -> Any:
        answer = self._client.infer(
            contract.ENSEMBLE,
            wire.infer_inputs(request, self._input_class),
            request_id=request.request_id,
            timeout=request.timeout_us,
        )
        return await _within(request.timeout, answer)

    async def close(self) -> None:
        await self._client.close()


async def _within(timeout: float | None, answer: Awaitable[T]) -> T:
    return await asyncio.wait_for(answer, wire.client_timeout(timeout))

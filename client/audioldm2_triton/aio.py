"""The client for asyncio, the counterpart of `client`."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, overload

from audioldm2_triton import contract
from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.events import Finished, OnProgress, Progress, StreamEvent
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.server_info import ServerInfo, read_server_info
from audioldm2_triton.transport import wire
from audioldm2_triton.transport.aio_connection import AsyncGrpcConnection, AsyncHttpConnection
from audioldm2_triton.transport.endpoint import DEFAULT_URL, parse_url
from audioldm2_triton.transport.failures import known_failures
from audioldm2_triton.transport.forks import check_not_forked, was_forked
from audioldm2_triton.transport.resending import DEFAULT_MAX_RETRIES, Resending, check_max_retries
from audioldm2_triton.transport.stream_reader import StreamReader
from audioldm2_triton.transport.wire import GenerateOptions, InferRequest, PerRow

if TYPE_CHECKING:
    from typing import Self, Unpack

T = TypeVar("T")


class AsyncAudioLDM2Client:
    """`AudioLDM2Client` for asyncio: the same arguments, results and errors.

    Used in another event loop, as by a second `asyncio.run`, it opens new connections. In a process that was forked it
    raises RuntimeError.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = contract.ENSEMBLE,
        root_certificates: str | PathLike[str] | None = None,
        api_key: str | None = None,
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        self._endpoint = parse_url(url, api_key)
        self._max_retries = check_max_retries(max_retries)
        self._model = model
        self._root_certificates = None if root_certificates is None else fspath(root_certificates)
        self._connection: AsyncGrpcConnection | AsyncHttpConnection | None = None
        self._opened_in: asyncio.AbstractEventLoop | None = None
        self._process = os.getpid()
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
        if was_forked(self._process):
            return  # even to forget the parent's connection ends the child, in gRPC
        connection, self._connection = self._connection, None
        if connection is not None and self._opened_in is asyncio.get_running_loop():
            await connection.close()

    async def server_info(self, timeout: float | None = None) -> ServerInfo:
        """Like `AudioLDM2Client.server_info`."""
        wire.check_timeout(timeout)
        with known_failures(self._endpoint, timeout):
            config = await self._open().model_config(timeout)
            serves_stream = await self._open().is_stream_ready(timeout)
        self._info = read_server_info(config, serves_stream)
        return self._info

    @overload
    async def generate(  # type: ignore[overload-overlap]
        self, prompt: str, *, on_progress: OnProgress | None = None, **options: "Unpack[GenerateOptions]"
    ) -> GenerationResult: ...

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
        transcription: PerRow[str | None] = None,
        window_length_in_s: PerRow[float] = contract.DEFAULT_WINDOW_LENGTH_IN_S,
        priority: str = contract.DEFAULT_PRIORITY,
        timeout: float | None = None,
        request_id: str = "",
        on_progress: OnProgress | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Like `AudioLDM2Client.generate`; cancelling the task takes the place of an interrupt."""
        wire.check_timeout(timeout)
        resending = Resending(self._max_retries, timeout)
        info = self._info
        if info is None:
            info = await self._until_available(resending, self.server_info)
        request = wire.build_request(
            info,
            prompt,
            negative_prompt=negative_prompt,
            audio_length_in_s=audio_length_in_s,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_waveforms_per_prompt=num_waveforms_per_prompt,
            seed=seed,
            scheduler=scheduler,
            return_scores=return_scores,
            transcription=transcription,
            window_length_in_s=window_length_in_s,
            priority=priority,
            timeout=timeout,
            request_id=request_id,
        )
        by_stream = on_progress is not None or self._goes_by_stream(request)

        async def attempt(left: float | None) -> GenerationResult | list[GenerationResult]:
            sent = replace(request, timeout=left)
            return await (self._generate_by_stream(sent, on_progress) if by_stream else self._generate_whole(sent))

        return await self._until_available(resending, attempt)

    async def _until_available(self, resending: Resending, attempt: Callable[[float | None], Awaitable[T]]) -> T:
        """Like the method of `AudioLDM2Client`."""
        while True:
            try:
                return await attempt(resending.timeout())
            except UnavailableError as error:
                self._info = None  # it may be another server that answers next
                await asyncio.sleep(resending.delay(error))

    async def _generate_whole(self, request: InferRequest) -> GenerationResult | list[GenerationResult]:
        with known_failures(self._endpoint, request.timeout):
            answer = await self._open().infer(request)
        return wire.read_results(request, answer)

    async def stream(self, prompt: str, **options: "Unpack[GenerateOptions]") -> AsyncGenerator[StreamEvent, None]:
        """Like `AudioLDM2Client.stream`, for `async for`; cancelling the task also cancels the request on the server.

        After a `break`, the event loop closes the generator, and so cancels the request, some time later. Use
        `contextlib.aclosing` to wait for that.
        """
        request = wire.build_request(self._info or await self.server_info(options.get("timeout")), prompt, **options)
        async with contextlib.aclosing(self._events(request)) as events:
            async for event in events:
                yield event

    async def _events(self, request: InferRequest) -> AsyncGenerator[StreamEvent, None]:
        wire.check_single(request)
        reader = StreamReader(request)
        with known_failures(self._endpoint, request.timeout):
            async with contextlib.aclosing(self._open().stream(request)) as responses:
                async for tensors in responses:
                    event = reader.read(tensors)
                    if event is not None:
                        yield event
        reader.end()

    def _goes_by_stream(self, request: InferRequest) -> bool:
        """Like the method of `AudioLDM2Client`."""
        return (
            request.single and self._endpoint.protocol == "grpc" and self._info is not None and self._info.serves_stream
        )

    async def _generate_by_stream(self, request: InferRequest, on_progress: OnProgress | None) -> GenerationResult:
        result = None
        async with contextlib.aclosing(self._events(request)) as events:
            async for event in events:
                if isinstance(event, Progress) and on_progress is not None:
                    on_progress(event)
                elif isinstance(event, Finished):
                    result = event.result
        assert result is not None  # or the stream would have raised
        return result

    def _open(self) -> "AsyncGrpcConnection | AsyncHttpConnection":
        """The connection, opened at the first call because it belongs to the running event loop."""
        if self._closed:
            raise RuntimeError("the client is closed")
        check_not_forked(self._process)
        loop = asyncio.get_running_loop()
        if self._connection is None or self._opened_in is not loop:
            # What an earlier loop has opened died with it.
            self._opened_in = loop
            open_connection = AsyncGrpcConnection if self._endpoint.protocol == "grpc" else AsyncHttpConnection
            self._connection = open_connection(self._endpoint, self._model, self._root_certificates)
        return self._connection

"""The client for ordinary programs; `aio` has its counterpart for asyncio."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Sequence
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
from audioldm2_triton.transport.connection import GrpcConnection, HttpConnection
from audioldm2_triton.transport.endpoint import DEFAULT_URL, parse_url
from audioldm2_triton.transport.failures import known_failures
from audioldm2_triton.transport.forks import check_not_forked, was_forked
from audioldm2_triton.transport.resending import DEFAULT_MAX_RETRIES, Resending, check_max_retries
from audioldm2_triton.transport.stream_reader import StreamReader
from audioldm2_triton.transport.wire import GenerateOptions, InferRequest, PerRow

if TYPE_CHECKING:
    from typing import Self, Unpack

T = TypeVar("T")


class AudioLDM2Client:
    """Sends requests to one server. Usable from several threads at once, and as a context manager.

    In a process that was forked it raises RuntimeError.

    Args:
        url: grpc://HOST[:8001], grpcs://HOST[:8001], http://HOST[:8000] or https://HOST[:443].
        model: the ensemble to ask, for a server with several checkpoints; its stream's name is derived from it.
        root_certificates: a PEM file with the certificate authorities to trust over TLS; by default the system's.
        api_key: for a server that has one (`scripts/serve --api-key`); by default AUDIOLDM2_API_KEY of the environment.
        max_retries: how often `generate` sends a request again if the server is full or cannot be reached, within the
            request's `timeout`; it waits longer each time. The audio is the same. 0: never. A `stream` is never sent
            again.
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
        certificates = None if root_certificates is None else fspath(root_certificates)
        open_connection = GrpcConnection if self._endpoint.protocol == "grpc" else HttpConnection
        self._connection: GrpcConnection | HttpConnection = open_connection(self._endpoint, model, certificates)
        self._process = os.getpid()
        self._info: ServerInfo | None = None
        self._closed = False

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. Requests still running in other threads fail."""
        self._closed = True
        if not was_forked(self._process):
            self._connection.close()

    def server_info(self, timeout: float | None = None) -> ServerInfo:
        """Asks the server for its limits, native length and schedulers; `timeout` is in seconds.

        Raises `UnavailableError` if there is no server or its models are not loaded, and `DeadlineExceededError`.
        """
        self._check_open()
        wire.check_timeout(timeout)
        with known_failures(self._endpoint, timeout):
            config = self._connection.model_config(timeout)
            serves_stream = self._connection.is_stream_ready(timeout)
        self._info = read_server_info(config, serves_stream)
        return self._info

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str, *, on_progress: OnProgress | None = None, **options: "Unpack[GenerateOptions]"
    ) -> GenerationResult: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: "Unpack[GenerateOptions]") -> list[GenerationResult]: ...

    def generate(
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
        """Generates the waveforms of one prompt, or of several in one request.

        Args:
            prompt: what to hear, or a sequence of 1 to 8 such texts. Each is generated as if it were alone.
            negative_prompt: what not to hear. This argument, and those below except the length, the number of
                waveforms, the priority, the timeout and the request id, take one value for all prompts or a sequence
                with one each.
            audio_length_in_s: seconds; by default the checkpoint's native length.
            num_inference_steps: denoising steps; more steps take longer.
            guidance_scale: how closely to follow the prompt; up to 1 means no guidance.
            num_waveforms_per_prompt: candidates for each prompt, ranked by their similarity to it.
            seed: random by default. The same seed and arguments reproduce the audio. A single seed applies to every
                prompt.
            scheduler: the name of a diffusers scheduler; `server_info().schedulers` lists the accepted ones.
            return_scores: whether to return CLAP scores. Always on with several waveforms per prompt; otherwise off by
                default.
            transcription: the words to say. Checkpoints that speak require it; all others refuse it.
            window_length_in_s: for long audio. Audio longer than this is generated in overlapping windows of this
                length, blended at every step; best is the native length of `server_info()`. 0, the default: no windows.
            priority: "interactive", the default, or "batch" for what nobody is waiting for. It changes no audio.
            timeout: seconds after which the server gives up the request. By default the server's own setting, which is
                an hour unless changed.
            request_id: a name for the request in the server's logs and traces.
            on_progress: called with a `Progress` after each evaluation of the UNet. Accepts one prompt only, and needs
                a server with `audioldm2_stream`.

        Over gRPC, a request with one prompt goes through the stream, as does every request with `on_progress`, so that
        an interrupt (Ctrl-C) also stops the work on the server. Several prompts in one request, and requests over HTTP
        without `on_progress`, are stopped there only by `timeout`; a `stream` can always be stopped.

        Returns one result for a string, and a list of results, in order, for a sequence.

        Raises `InvalidArgumentError` (names the argument), `UnavailableError` (the server is full or cannot be
        reached), `DeadlineExceededError`, `RequestCancelledError` or `InternalError`; all are `AudioLDM2Error`s.
        """
        wire.check_timeout(timeout)
        resending = Resending(self._max_retries, timeout)
        info = self._info or self._until_available(resending, self.server_info)
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

        def attempt(left: float | None) -> GenerationResult | list[GenerationResult]:
            sent = replace(request, timeout=left)
            return self._generate_by_stream(sent, on_progress) if by_stream else self._generate_whole(sent)

        return self._until_available(resending, attempt)

    def _until_available(self, resending: Resending, attempt: Callable[[float | None], T]) -> T:
        """Calls `attempt` with the timeout that is left, again as long as `resending` allows."""
        while True:
            try:
                return attempt(resending.timeout())
            except UnavailableError as error:
                self._info = None  # it may be another server that answers next
                time.sleep(resending.delay(error))

    def _generate_whole(self, request: InferRequest) -> GenerationResult | list[GenerationResult]:
        self._check_open()
        with known_failures(self._endpoint, request.timeout):
            answer = self._connection.infer(request)
        return wire.read_results(request, answer)

    def stream(self, prompt: str, **options: "Unpack[GenerateOptions]") -> Generator[StreamEvent, None, None]:
        """Generates the waveforms of one prompt and yields events: `Progress`, then `AudioChunk`, finally `Finished`.

        Arguments and errors are those of `generate`. Nothing is sent, and nothing raised, until the first event is
        requested. Whatever ends the iteration early (`break`, an exception, `close()`) cancels the request on the
        server, at its next denoising step.

        Over HTTP the server sees a cancellation as a closed connection, which a proxy may hide from it.
        """
        request = wire.build_request(self._info or self.server_info(options.get("timeout")), prompt, **options)
        yield from self._events(request)

    def _events(self, request: InferRequest) -> Generator[StreamEvent, None, None]:
        wire.check_single(request)
        self._check_open()
        reader = StreamReader(request)
        with (
            known_failures(self._endpoint, request.timeout),
            contextlib.closing(self._connection.stream(request)) as responses,
        ):
            for tensors in responses:
                event = reader.read(tensors)
                if event is not None:
                    yield event
                    check_not_forked(self._process)
        reader.end()

    def _goes_by_stream(self, request: InferRequest) -> bool:
        """Whether a request without `on_progress` goes through the stream: not over HTTP, where JSON is much larger."""
        return (
            request.single and self._endpoint.protocol == "grpc" and self._info is not None and self._info.serves_stream
        )

    def _generate_by_stream(self, request: InferRequest, on_progress: OnProgress | None) -> GenerationResult:
        result = None
        with contextlib.closing(self._events(request)) as events:
            for event in events:
                if isinstance(event, Progress) and on_progress is not None:
                    on_progress(event)
                elif isinstance(event, Finished):
                    result = event.result
        assert result is not None  # or the stream would have raised
        return result

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")
        check_not_forked(self._process)

"""The client for ordinary programs; `aio` has its twin for asyncio."""

import threading
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from audioldm2_triton import contract, wire
from audioldm2_triton.endpoint import DEFAULT_URL, Endpoint, parse_url
from audioldm2_triton.failures import known_failures
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.server_info import ServerInfo, read_server_info
from audioldm2_triton.wire import GenerateOptions, InferRequest, PerRow

if TYPE_CHECKING:
    from typing import Self, Unpack


class AudioLDM2Client:
    """A connection to one server. Usable from several threads at once, and as a context manager.

    Args:
        url: grpc://HOST[:8001], grpcs://HOST[:8001], http://HOST[:8000] or https://HOST[:443].
        root_certificates: a PEM file with the authorities to trust over TLS; by default the system's.
    """

    def __init__(self, url: str = DEFAULT_URL, *, root_certificates: str | PathLike[str] | None = None) -> None:
        self._endpoint = parse_url(url)
        certificates = None if root_certificates is None else fspath(root_certificates)
        open_connection = _GrpcConnection if self._endpoint.protocol == "grpc" else _HttpConnection
        self._connection: _GrpcConnection | _HttpConnection = open_connection(self._endpoint, certificates)
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
        self._connection.close()

    def server_info(self, timeout: float | None = None) -> ServerInfo:
        """Asks the server for its limits, native length and schedulers; `timeout` in seconds.

        Raises `UnavailableError` where there is no server or it has not loaded the models, and `DeadlineExceededError`.
        """
        self._check_open()
        wire.check_timeout(timeout)
        with known_failures(self._endpoint, timeout):
            config = self._connection.model_config(timeout)
        self._info = read_server_info(config)
        return self._info

    @overload
    def generate(self, prompt: str, **options: "Unpack[GenerateOptions]") -> GenerationResult: ...  # type: ignore[overload-overlap]

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
        timeout: float | None = None,
        request_id: str = "",
    ) -> GenerationResult | list[GenerationResult]:
        """Generates the waveforms of one prompt, or of several in one request.

        Args:
            prompt: what to hear; or a sequence of 1 to 8 of them. Each is generated as if it were alone.
            negative_prompt: what not to hear. This and all arguments below but the length, the number of waveforms,
                the timeout and the request id are one value for all prompts or a sequence of one for each.
            audio_length_in_s: seconds; by default the checkpoint's native length.
            num_inference_steps: denoising steps; more take longer.
            guidance_scale: how closely to follow the prompt; up to 1 means no guidance.
            num_waveforms_per_prompt: candidates for each prompt, ranked by their similarity with it.
            seed: the same seed and arguments give the same audio; by default drawn. One seed goes for all prompts.
            scheduler: the name of a diffusers scheduler; `server_info().schedulers` has the accepted ones.
            return_scores: whether to score the waveforms; by default, and always, with more than one of them.
            timeout: seconds until the server gives the request up; by default it never does.
            request_id: a name for the request in the server's logs and traces.

        Returns one result for a string and a list of results, in order, for a sequence.

        Raises `InvalidArgumentError` (names the argument), `UnavailableError` (the server is full or not reachable),
        `DeadlineExceededError`, `RequestCancelledError` or `InternalError`, all of them `AudioLDM2Error`.
        """
        request = wire.build_request(
            self._info or self.server_info(timeout),
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
        self._check_open()
        with known_failures(self._endpoint, timeout):
            answer = self._connection.infer(request)
        return wire.read_results(request, answer)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")


class _GrpcConnection:
    """One channel, shared by all threads."""

    def __init__(self, endpoint: Endpoint, root_certificates: str | None) -> None:
        from tritonclient import grpc

        self._input_class = grpc.InferInput
        self._client = grpc.InferenceServerClient(
            endpoint.address, ssl=endpoint.tls, root_certificates=root_certificates
        )

    def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        answer = self._client.get_model_config(
            contract.ENSEMBLE, as_json=True, client_timeout=wire.client_timeout(timeout)
        )
        config: Mapping[str, Any] = answer["config"]
        return config

    def infer(self, request: InferRequest) -> Any:
        return self._client.infer(
            contract.ENSEMBLE,
            wire.infer_inputs(request, self._input_class),
            request_id=request.request_id,
            timeout=request.timeout_us,
            client_timeout=wire.client_timeout(request.timeout),
        )

    def close(self) -> None:
        self._client.close()


class _HttpConnection:
    """One `tritonclient.http` per thread, because it is not thread-safe."""

    def __init__(self, endpoint: Endpoint, root_certificates: str | None) -> None:
        self._endpoint = endpoint
        self._root_certificates = root_certificates
        self._local = threading.local()

    def model_config(self, timeout: float | None) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self._client(timeout).get_model_config(contract.ENSEMBLE)
        return config

    def infer(self, request: InferRequest) -> Any:
        from tritonclient import http

        return self._client(request.timeout).infer(
            contract.ENSEMBLE,
            wire.infer_inputs(request, http.InferInput),
            request_id=request.request_id,
            timeout=request.timeout_us,
        )

    def close(self) -> None:
        # Each thread's client closes itself when nothing refers to it any more.
        self._local = threading.local()

    def _client(self, timeout: float | None) -> Any:
        """This thread's client. A timeout belongs to the connection, so that another one takes a new connection."""
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
            self._local.timeout = timeout
        return self._local.client

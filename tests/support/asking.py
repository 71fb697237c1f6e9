"""Requests by every way, from clients that know when no answer came, and the right audio of each."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty

import numpy as np
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from audioldm2_pipeline import difference
from audioldm2_triton import contract
from metrics_page import is_idle, wait_for_metrics
from plain_requests import Stream, infer_inputs
from server_faults import faults_found_in
from serving.local_server import LocalServer, local_server

WAIT_IN_S = 60.0
TOLERANCE = 1e-4  # of the peak
STEPS = 2


@dataclass(frozen=True)
class Request:
    """One of the requests of the tests; they differ, so that an answer to another one would be seen."""

    way: str  # grpc, http or stream
    steps: int = STEPS

    @property
    def rows(self) -> dict[str, list]:
        prompts = {"grpc": b"rain", "http": b"a dog barks", "stream": b"birds sing over deep water"}
        return {
            "prompt": [prompts[self.way]],
            "seed": [len(self.way)],
            "audio_length_in_s": [{"grpc": 0.32, "http": 0.64, "stream": 0.48}[self.way]],
            "num_inference_steps": [self.steps],
            "return_scores": [True],
        }


WAYS = ("grpc", "http", "stream")


class UnansweredError(Exception):
    """No answer came while the client waited."""


@dataclass
class Asking:
    """Sends requests, and counts them and those that had no answer."""

    server: LocalServer
    sent: int = 0
    unanswered: int = 0
    _solo: dict[Request, np.ndarray] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def audio(self, request: Request, timeout_in_s: float | None = None) -> np.ndarray | Exception:
        """The audio [1, 1, S] of a request, or why there is none."""
        with self._lock:
            self.sent += 1
        send: Callable[[Request, int | None], np.ndarray] = getattr(self, f"_by_{request.way}")
        try:
            return send(request, None if timeout_in_s is None else int(timeout_in_s * 1e6))
        except InferenceServerException as error:
            if "Deadline Exceeded" not in error.message():  # gRPC's own words, of the client
                return error
            failure: Exception = error
        except (Empty, OSError, HTTPConnectionClosed) as error:
            failure = error
        with self._lock:
            self.unanswered += 1
        return UnansweredError(f"{request}: {failure!r}")

    def _by_grpc(self, request: Request, timeout_us: int | None) -> np.ndarray:
        with grpc.InferenceServerClient(f"localhost:{self.server.grpc_port}") as client:
            inputs = infer_inputs(grpc, request.rows)
            answer = client.infer(contract.ENSEMBLE, inputs, timeout=timeout_us, client_timeout=WAIT_IN_S)
        return answer.as_numpy("audio")

    def _by_http(self, request: Request, timeout_us: int | None) -> np.ndarray:
        address = f"localhost:{self.server.http_port}"
        with http.InferenceServerClient(address, network_timeout=WAIT_IN_S) as client:
            answer = client.infer(contract.ENSEMBLE, infer_inputs(http, request.rows), timeout=timeout_us)
        return answer.as_numpy("audio")

    def _by_stream(self, request: Request, timeout_us: int | None) -> np.ndarray:
        with closing(Stream(self.server, WAIT_IN_S)) as stream:
            stream.send(request.rows, **({} if timeout_us is None else {"timeout": timeout_us}))
            try:
                responses = list(stream.responses())
            except Empty:
                stream.cancel()  # else closing waits for the answer
                raise
        steps = [int(response["step"][0, 0]) for response in responses if "step" in response]
        assert steps == list(range(1, len(steps) + 1)), "the steps have gaps"
        return np.concatenate([response["audio"] for response in responses if "audio" in response], axis=2)

    def together(self, requests: list[Request]) -> list[np.ndarray | Exception]:
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self.audio, requests))

    def check_right(self, request: Request, outcome: np.ndarray | Exception) -> None:
        """Compares with the audio that the request has alone, while nothing is armed."""
        assert isinstance(outcome, np.ndarray), f"{request}: {outcome!r}"
        if request not in self._solo:
            alone = self.audio(request)
            assert isinstance(alone, np.ndarray), f"{request} alone: {alone!r}"
            self._solo[request] = alone
        assert difference(outcome, self._solo[request]) < TOLERANCE, request

    def check_idle(self) -> None:
        wait_for_metrics(self.server, is_idle, "all gauges back at zero")


@contextmanager
def asking_a_server(checkpoint: Path, fault_directory: Path, log: Path) -> Iterator[Asking]:
    """Starts a server that looks for faults, without a cache of texts, so that all of them are encoded every time."""
    with faults_found_in(fault_directory), local_server(checkpoint, log, "--embedding-cache-size=0") as running:
        yield Asking(running)


def check_failure(outcome: np.ndarray | Exception, request: Request, codes: dict[str, str], words: str) -> None:
    """Streams have no codes."""
    assert isinstance(outcome, InferenceServerException), f"{request}: {outcome!r}"
    assert words in outcome.message(), outcome.message()
    assert "\n" not in outcome.message()
    if request.way != "stream":
        assert outcome.status() == codes[request.way], outcome

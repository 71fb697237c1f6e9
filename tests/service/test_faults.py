"""Faults at every fault point: who is concerned is answered, all others are right, and nothing is left behind."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import pytest
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from audioldm2_pipeline import difference
from audioldm2_triton import contract
from audioldm2_triton.server import faults
from audioldm2_triton.server.faults import LEAK, MEMORY, NAN, PANIC, POINTS, RAISE, STALL
from audioldm2_triton.server.stage_thread import BATCH_ROWS
from metrics_page import is_idle, read_metrics, wait_for_metrics
from plain_requests import Stream, infer_inputs
from project import ROOT
from server_faults import faults_found_in
from serving.local_server import LocalServer, local_server
from supervised_server import wait_until

WAIT_IN_S = 60.0
TOLERANCE = 1e-4  # of the peak
STEPS = 2

# Faults of these kinds at these points concern nobody's audio: metrics and progress are courtesies.
HARMLESS = {
    *((f"denoiser.{point}", kind) for point in ("observer", "listener", "control") for kind in (RAISE, PANIC)),
    *(("audioldm2_stream.watch", kind) for kind in (RAISE, PANIC, STALL)),
}
# What fails here is the work of several requests: all of them fail, since it cannot be told which is to blame.
SHARED = {(f"denoiser.{point}", kind) for point in ("step", "regroup") for kind in (RAISE, PANIC)}
# What fails here for several requests is done again for each of them alone.
ISOLATED = {"text_conditioning.encode", "decoder.VAE", "decoder.vocoder", "decoder.score"}
# What lacks memory here for several requests is done again for half of them.
HALVED = {*ISOLATED, "denoiser.step", "denoiser.regroup"}
FATAL = "denoiser.loop"
ONLY_STREAMS = {
    "denoiser.listener",
    "denoiser.control",
    *(point for point in POINTS if point.startswith("audioldm2_stream.")),
}


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


@pytest.fixture(scope="module")
def asking(tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    log = tmp_path_factory.mktemp("faulty") / "log"
    # Without a cache of texts, so that all of them are encoded every time.
    with faults_found_in(fault_directory), local_server(tiny_checkpoint, log, "--embedding-cache-size=0") as running:
        yield Asking(running)


def check_failure(outcome: np.ndarray | Exception, request: Request, codes: dict[str, str], words: str) -> None:
    """Streams have no codes."""
    assert isinstance(outcome, InferenceServerException), f"{request}: {outcome!r}"
    assert words in outcome.message(), outcome.message()
    assert "\n" not in outcome.message()
    if request.way != "stream":
        assert outcome.status() == codes[request.way], outcome


def check_failed(outcome: np.ndarray | Exception, request: Request, point: str, kind: str) -> None:
    """The stage is named, and a request that lacked memory may be sent again."""
    codes = {"grpc": "StatusCode.INTERNAL", "http": "500"}
    if kind == MEMORY:
        codes = {"grpc": "StatusCode.UNAVAILABLE", "http": "503"}
    check_failure(outcome, request, codes, point.partition(".")[0])


def check_struck_in_a_crowd(asking: Asking, directory: Path, point: str, kind: str, steps: int) -> None:
    crowd = [Request(way, steps) for way in WAYS]
    file = faults.arm(directory, point, kind)
    outcomes = asking.together(crowd)
    assert faults.has_struck(file), "nobody came by"
    failed = [isinstance(outcome, Exception) for outcome in outcomes]
    for request, outcome in zip(crowd, outcomes, strict=True):
        if isinstance(outcome, Exception):
            check_failed(outcome, request, point, kind)
            assert request.way == "stream" or point not in ONLY_STREAMS
        else:
            asking.check_right(request, outcome)
    least, most = (0, 0) if (point, kind) in HARMLESS else (1, 1)
    if (point, kind) in SHARED:
        most = len(crowd)
    elif point in ISOLATED or (point in HALVED and kind == MEMORY):
        least = 0
    assert least <= sum(failed) <= most, outcomes


REASONS = {NAN: "non_finite", MEMORY: "out_of_memory", RAISE: "internal", PANIC: "internal"}


def check_struck_alone(asking: Asking, directory: Path, point: str, kind: str, request: Request) -> None:
    counter = f'audioldm2_stage_failures_total{{model="{point.partition(".")[0]}",reason="{REASONS[kind]}"}}'
    before = read_metrics(asking.server).get(counter, 0)
    file = faults.arm(directory, point, kind)
    outcome = asking.audio(request)
    assert faults.has_struck(file), "nobody came by"
    if kind in (NAN, MEMORY):
        assert read_metrics(asking.server)[counter] == before + 1
    if (point, kind) in HARMLESS:
        asking.check_right(request, outcome)
    else:
        check_failed(outcome, request, point, kind)


def check_stalled(asking: Asking, directory: Path, point: str, request: Request) -> None:
    """One request is held up until after its deadline; others come meanwhile, and have none."""
    timeout_in_s = None if (point, STALL) in HARMLESS else 0.4
    with ThreadPoolExecutor(len(WAYS)) as pool:
        while True:
            file = faults.arm(directory, point, STALL)
            concerned = pool.submit(asking.audio, request, timeout_in_s)
            while not faults.has_struck(file) and not concerned.done():
                time.sleep(0.002)
            if faults.has_struck(file):
                break
            assert timeout_in_s is not None, "nobody came by"
            # The machine is so slow that the deadline came before the request did.
            check_expired(concerned.result(), request)
            timeout_in_s *= 3
        try:
            others = [Request(way, request.steps) for way in WAYS if way != request.way]
            neighbours = [pool.submit(asking.audio, other) for other in others]
            outcome = concerned.result()
        finally:
            file.unlink()
    # Both are also told by the threads that take requests in, beside which the engine goes on.
    beside_the_engine = point in ("denoiser.observer", "denoiser.listener") and isinstance(outcome, np.ndarray)
    if (point, STALL) in HARMLESS or beside_the_engine:
        asking.check_right(request, outcome)
    else:
        check_expired(outcome, request)
    for other, neighbour in zip(others, neighbours, strict=True):
        asking.check_right(other, neighbour.result())


def check_expired(outcome: np.ndarray | Exception, request: Request) -> None:
    check_failure(outcome, request, {"grpc": "StatusCode.CANCELLED", "http": "400"}, "deadline exceeded")


def test_every_fault_is_answered(asking: Asking, fault_directory: Path) -> None:
    cases = [(point, kind) for point, kinds in POINTS.items() for kind in kinds if point != FATAL and kind != LEAK]
    new_steps = iter(range(STEPS + 1, 1000))
    for number, (point, kind) in enumerate(cases):
        # Only schedules that are new are built; and who asks for progress only now and then needs some steps.
        usual = 20 if point == "denoiser.listener" else STEPS
        steps = [next(new_steps) if point == "denoiser.schedule" else usual for _ in range(2)]
        way = "stream" if point in ONLY_STREAMS else WAYS[number % len(WAYS)]
        try:
            if kind == STALL:
                check_stalled(asking, fault_directory, point, Request(way, steps[0]))
            else:
                check_struck_in_a_crowd(asking, fault_directory, point, kind, steps[0])
                check_struck_alone(asking, fault_directory, point, kind, Request(way, steps[1]))
            following = Request(WAYS[(number + 1) % len(WAYS)])
            asking.check_right(following, asking.audio(following))
        except AssertionError as error:
            raise AssertionError(f"{kind} at {point}: {error}") from error
    asking.check_idle()
    print(f"{len(POINTS)} points, {len(cases)} faults, {asking.sent} requests, {asking.unanswered} without an answer")
    assert asking.unanswered == 0
    assert asking.sent >= 4 * len(cases)


def decoder_inputs(deadline_ns: int = 0, priority: str = contract.INTERACTIVE) -> list[grpc.InferInput]:
    """Latents of 0.16 s, as another stage would send them."""
    values: dict[str, tuple[str, np.ndarray]] = {
        "latents": ("FP32", np.zeros((1, 1, 8, 4, 16), np.float32)),
        "num_samples": ("INT32", np.array([[2560]], np.int32)),
        "return_scores": ("BOOL", np.array([[False]])),
        "text_embeds": ("FP32", np.zeros((1, 40), np.float32)),
        "deadline_ns": ("INT64", np.array([[deadline_ns]])),
        "priority": ("BYTES", np.array([[priority.encode()]], np.object_)),
    }
    inputs = [grpc.InferInput(name, array.shape, kind) for name, (kind, array) in values.items()]
    for tensor, (_, array) in zip(inputs, values.values(), strict=True):
        tensor.set_data_from_numpy(array)
    return inputs


def is_open(client: grpc.InferenceServerClient) -> bool:
    """Returns whether the first stage takes a request."""
    try:
        client.infer("text_conditioning", infer_inputs(grpc, Request("grpc").rows))
    except InferenceServerException as error:
        if "decoder is full" in error.message():
            return False
        raise
    return True


def test_a_decoder_that_falls_behind_closes_the_entrance(asking: Asking, fault_directory: Path) -> None:
    file = faults.arm(fault_directory, "decoder.VAE", STALL)
    answers: SimpleQueue[tuple[object, InferenceServerException | None]] = SimpleQueue()

    def answer(result: object, error: InferenceServerException | None) -> None:
        answers.put((result, error))

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        try:
            for _ in range(140):  # more than may be inside
                client.async_infer("decoder", decoder_inputs(), answer)
            wait_until(lambda: not is_open(client), "the decoder to count as full")
            for way in WAYS:
                codes = {"grpc": "StatusCode.UNAVAILABLE", "http": "503"}
                check_failure(asking.audio(Request(way)), Request(way), codes, "decoder is full; try again later")
        finally:
            file.unlink()
        failures = [error for _, error in (answers.get(timeout=WAIT_IN_S) for _ in range(140)) if error is not None]
        wait_until(lambda: is_open(client), "the entrance to open")
    assert failures == []
    request = Request("grpc")
    asking.check_right(request, asking.audio(request))
    asking.check_idle()


def wait_until_inside(asking: Asking, model: str, requests: int) -> None:
    gauge = f'audioldm2_stage_requests{{model="{model}"}}'
    wait_for_metrics(asking.server, lambda page: page[gauge] == requests, f"{requests} requests in {model}")


def test_interactive_requests_are_decoded_before_those_of_low_priority(asking: Asking, fault_directory: Path) -> None:
    file = faults.arm(fault_directory, "decoder.VAE", STALL)
    answers: SimpleQueue[str] = SimpleQueue()

    def send(priority: str) -> None:
        def answer(result: object, error: InferenceServerException | None) -> None:
            answers.put(priority if result else str(error))

        client.async_infer("decoder", decoder_inputs(priority=priority), answer)

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        try:
            for _ in range(25):
                send(contract.BATCH)
            wait_until_inside(asking, "decoder", 25)
            send(contract.INTERACTIVE)
            wait_until_inside(asking, "decoder", 26)
        finally:
            file.unlink()
        order = [answers.get(timeout=WAIT_IN_S) for _ in range(26)]
    assert sorted(order) == [contract.BATCH] * 25 + [contract.INTERACTIVE]
    # It came last, when a group was being decoded, and perhaps the next one had begun.
    assert order.index(contract.INTERACTIVE) <= 2 * BATCH_ROWS
    asking.check_idle()


def test_requests_that_wait_for_the_decoder_share_a_batch(asking: Asking, fault_directory: Path) -> None:
    stall = faults.arm(fault_directory, "decoder.VAE", STALL)
    answers: SimpleQueue[InferenceServerException | None] = SimpleQueue()

    def answer(result: object, error: InferenceServerException | None) -> None:
        assert (result is None) != (error is None)
        answers.put(error)

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        try:
            client.async_infer("decoder", decoder_inputs(), answer)
            wait_until(lambda: faults.has_struck(stall), "the first to be decoded")
            for _ in range(8):
                client.async_infer("decoder", decoder_inputs(), answer)
            wait_until_inside(asking, "decoder", 9)
            faults.arm(fault_directory, "decoder.vocoder", RAISE, times=2)  # strikes the first, and then the others
        finally:
            stall.unlink()
        errors = [answers.get(timeout=WAIT_IN_S) for _ in range(9)]
    assert len([error for error in errors if error is not None]) == 1
    said = r"a batch of (\d+) requests failed \(fault at decoder\.vocoder\)"
    # The last of them may have missed it.
    assert int(re.findall(said, asking.server.log.read_text())[-1]) >= 7
    asking.check_idle()


def test_what_nobody_waits_for_is_not_decoded(asking: Asking, fault_directory: Path) -> None:
    cancelled = 'audioldm2_stage_failures_total{model="decoder",reason="cancelled"}'
    answers: SimpleQueue[InferenceServerException | None] = SimpleQueue()

    def answer(result: object, error: InferenceServerException | None) -> None:
        assert (result is None) != (error is None)
        answers.put(error)

    def is_dropped() -> bool:
        """Cancels a request that waits, and returns whether the server knew of it when its turn came."""
        before = read_metrics(asking.server).get(cancelled, 0)
        file = faults.arm(fault_directory, "decoder.VAE", STALL)
        try:
            client.async_infer("decoder", decoder_inputs(), answer)
            wait_until(lambda: faults.has_struck(file), "the first to be decoded")
            call = client.async_infer("decoder", decoder_inputs(), answer)
            wait_until_inside(asking, "decoder", 2)
            call.cancel()
            assert "cancelled" in str(answers.get(timeout=WAIT_IN_S)).lower()
            client.is_server_live()
        finally:
            file.unlink()
        assert answers.get(timeout=WAIT_IN_S) is None
        asking.check_idle()
        return read_metrics(asking.server).get(cancelled, 0) == before + 1

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        wait_until(is_dropped, "a cancelled request to be dropped")


def test_what_is_late_is_not_decoded(asking: Asking, fault_directory: Path) -> None:
    file = faults.arm(fault_directory, "decoder.VAE", RAISE)
    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        with pytest.raises(InferenceServerException, match="deadline exceeded"):
            client.infer("decoder", decoder_inputs(deadline_ns=time.monotonic_ns()))
        # Had it been decoded, before or after its answer, the fault would be spent.
        with pytest.raises(InferenceServerException, match=r"fault at decoder\.VAE"):
            client.infer("decoder", decoder_inputs())
        assert faults.has_struck(file)
        client.infer("decoder", decoder_inputs())


def test_an_engine_that_cannot_go_on_answers_what_it_held(asking: Asking, fault_directory: Path) -> None:
    """The last test with this server, whose supervisor replaces it: its only engine is broken."""
    file = faults.arm(fault_directory, FATAL, RAISE)
    crowd = [Request(way) for way in WAYS]
    outcomes = asking.together(crowd)
    assert faults.has_struck(file)
    for request, outcome in zip(crowd, outcomes, strict=True):
        check_failure(outcome, request, {"grpc": "StatusCode.UNAVAILABLE", "http": "503"}, "engine is broken")
    assert asking.unanswered == 0
    assert f"fault at {FATAL}" in asking.server.log.read_text(), "the log says why"
    deadline = time.monotonic() + WAIT_IN_S
    while isinstance(following := asking.audio(crowd[0]), Exception):
        assert time.monotonic() < deadline, f"no new server: {following!r}"
        time.sleep(0.1)
    assert "all engines of denoiser are broken" in asking.server.log.read_text()
    asking.check_right(crowd[0], following)
    asking.check_idle()


def test_no_request_can_arm_a_fault(server: LocalServer, tmp_path: Path) -> None:
    """A server that is started as users start it looks for faults nowhere, whatever it is sent."""
    files = [faults.arm(tmp_path, point, RAISE) for point in POINTS]
    parameters = {faults.DIRECTORY_VARIABLE: str(tmp_path), faults.DIRECTORY_VARIABLE.lower(): str(tmp_path)}
    parameters |= dict.fromkeys(POINTS, RAISE)
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        for model in (contract.ENSEMBLE, "text_conditioning"):
            client.infer(model, infer_inputs(grpc, Request("grpc").rows), parameters=parameters)
    assert all(file.exists() for file in files)


def test_every_point_is_in_the_code() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "model_repository").glob("*/1/**/*.py"))
    for point in POINTS:
        if point not in ("decoder.VAE", "decoder.vocoder"):  # by the name of the part
            assert code.count(f'"{point}"') == 1, point

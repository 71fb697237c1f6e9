"""Faults at every fault point: who is concerned is answered, all others are right, and nothing is left behind."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc

from asking import STEPS, WAIT_IN_S, WAYS, Asking, Request, asking_a_server, check_failure
from audioldm2_triton import contract
from audioldm2_triton.server import faults
from audioldm2_triton.server.faults import LEAK, MEMORY, NAN, PANIC, POINTS, RAISE, STALL
from metrics_page import read_metrics
from plain_requests import infer_inputs
from project import ROOT
from serving.local_server import LocalServer

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


@pytest.fixture(scope="module")
def asking(tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    with asking_a_server(tiny_checkpoint, fault_directory, tmp_path_factory.mktemp("faulty") / "log") as asking:
        yield asking


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

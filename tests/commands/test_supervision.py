"""`scripts/serve` as a supervisor, on real servers: what dies or stops is replaced, and a stop leaves nothing."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from audioldm2_pipeline import difference
from audioldm2_triton import AudioLDM2Client, AudioLDM2Error, UnavailableError
from audioldm2_triton.server import faults
from namespaces import another_host
from plain_requests import Stream, infer_inputs
from server_faults import faults_found_in, held_steps, wait_for_requests
from serving.local_server import LocalServer, free_ports, local_server, serve_command, server_on
from serving.server_error import ServerError
from serving.stage_processes import find_stages
from supervised_server import WAIT_IN_S, health, shared_memory, stage, triton, wait_until

SHORT = {"prompt": "a dog", "audio_length_in_s": 0.3, "num_inference_steps": 2, "seed": 1}
RESENT = SHORT | {"num_inference_steps": 150}
LONG = {"prompt": [b"a dog"], "num_inference_steps": [200], "audio_length_in_s": [1.0], "seed": [1]}


@pytest.fixture(scope="module")
def supervised(
    tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("supervised") / "log"
    with faults_found_in(fault_directory), local_server(tiny_checkpoint, log) as server:
        yield server


@pytest.fixture(scope="module")
def right_audio(supervised: LocalServer) -> np.ndarray:
    with AudioLDM2Client(supervised.grpc_url) as client:
        return client.generate(**RESENT).audio


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (AudioLDM2Error, InferenceServerException, OSError, http.client.HTTPException) as error:
        return error


def start_calls(
    server: LocalServer, pool: ThreadPoolExecutor, request: dict[str, list[Any]] = LONG
) -> list[Future[Any]]:
    """Long requests over gRPC, over HTTP and as a stream, whose clients would wait for minutes."""

    def unary() -> Any:
        with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
            return client.infer("audioldm2", infer_inputs(grpc, request), client_timeout=WAIT_IN_S)

    def as_json() -> Any:
        words = {name: value.decode() if isinstance(value, bytes) else value for name, (value,) in request.items()}
        body = json.dumps(words).encode()
        url = f"{server.http_url}/v2/models/audioldm2/generate"
        with urllib.request.urlopen(url, data=body, timeout=WAIT_IN_S) as answer:
            return answer.read()

    def stream() -> Any:
        opened = Stream(server, wait_in_s=WAIT_IN_S)
        try:
            opened.send(request)
            return list(opened.responses())
        finally:
            opened.close()

    return [pool.submit(outcome, call) for call in (unary, as_json, stream)]


# At most as many as a supervisor restarts a server within ten minutes.
FAILURES = [
    ("denoiser", signal.SIGKILL),
    ("decoder", signal.SIGSTOP),
    pytest.param("text_conditioning", signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param("audioldm2_stream", signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param("denoiser", signal.SIGSTOP, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "signal_number"), FAILURES)
def test_a_stage_that_dies_or_stops_is_replaced(
    model: str,
    signal_number: signal.Signals,
    supervised: LocalServer,
    fault_directory: Path,
    right_audio: np.ndarray,
) -> None:
    wait_until(lambda: health(supervised)[0] == 200, "readiness")
    before = health(supervised)[1]["restarts"]
    old = shared_memory(supervised)
    assert old
    with ThreadPoolExecutor(4) as pool, AudioLDM2Client(supervised.grpc_url, max_retries=100) as client:
        with held_steps(fault_directory):
            calls = start_calls(supervised, pool)
            resent = pool.submit(client.generate, **RESENT)
            wait_for_requests(supervised, 4)
            stage(supervised, model).send_signal(signal_number)
            wait_until(lambda: health(supervised)[0] == 503, "the failure to be noticed")
            # Without a time limit of their own: all calls have ended because the server that had them is gone.
            assert all(isinstance(call.result(timeout=WAIT_IN_S), Exception) for call in calls)
        # And one that is sent again has its answer from the next server, with the threads of another start.
        assert difference(resent.result(timeout=WAIT_IN_S).audio, right_audio) < 1e-5
    wait_until(lambda: health(supervised)[0] == 200, "readiness")
    code, state = health(supervised, "/live")
    assert (code, state["state"], state["restarts"]) == (200, "ready", before + 1)
    assert model in state["reason"]
    assert not old & set(Path("/dev/shm").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("point", ["text_conditioning.encode", "denoiser.step", "decoder.VAE"])
def test_a_stage_that_hangs_is_replaced(
    point: str, tiny_checkpoint: Path, fault_directory: Path, tmp_path: Path
) -> None:
    with (
        faults_found_in(fault_directory),
        local_server(tiny_checkpoint, tmp_path / "log", "--stall-timeout-in-s=3") as server,
        ThreadPoolExecutor(4) as pool,
    ):
        file = faults.arm(fault_directory, point, faults.STALL)
        calls = [pool.submit(_long_call, server) for _ in range(4)]
        wait_until(lambda: health(server)[1]["restarts"] == 1, "the hanging stage to be noticed")
        file.unlink()
        assert all(isinstance(call.result(timeout=WAIT_IN_S), Exception) for call in calls)
        wait_until(lambda: health(server)[0] == 200, "readiness")
        assert point.partition(".")[0] in health(server)[1]["reason"]
        with AudioLDM2Client(server.grpc_url) as client:
            client.generate(**SHORT)


def _long_call(server: LocalServer) -> Any:
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        return outcome(lambda: client.infer("audioldm2", infer_inputs(grpc, LONG), client_timeout=WAIT_IN_S))


def test_administration_is_refused_and_other_machines_too(supervised: LocalServer) -> None:
    wait_until(lambda: health(supervised)[0] == 200, "readiness")
    for path in (
        "/v2/repository/index",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/logging",
        "/v2/trace/setting",
    ):
        connection = http.client.HTTPConnection("localhost", supervised.http_port, timeout=30)
        connection.request("POST", path, body=b"{}")
        assert connection.getresponse().status == 403, path
        connection.close()
    with grpc.InferenceServerClient(f"localhost:{supervised.grpc_port}") as client:
        for refused in (client.get_model_repository_index, client.get_log_settings, client.get_trace_settings):
            with pytest.raises(InferenceServerException, match="restricted"):
                refused()
    ports = {supervised.http_port, supervised.grpc_port, supervised.metrics_port, supervised.health_port}
    listening = [
        connection.laddr
        for process in (psutil.Process(supervised.process.pid), triton(supervised))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
    ]
    assert {address.port for address in listening} == ports
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}  # gRPC writes it as IPv6


CONNECT = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 10).close()
        print("connected")
    except ConnectionRefusedError:
        print("refused")
"""


def test_another_host_cannot_connect(supervised: LocalServer) -> None:
    ports = (supervised.http_port, supervised.grpc_port, supervised.metrics_port, supervised.health_port)
    with another_host() as (address, there), socket.create_server(("0.0.0.0", 0)) as open_to_all:
        tried = [str(port) for port in (open_to_all.getsockname()[1], *ports)]
        command = [*there, sys.executable, "-c", CONNECT, address, *tried]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert found == ["connected", *["refused"] * len(ports)]


def ignored_signals(process: int) -> set[int]:
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return {number for number in range(1, 65) if int(mask, 16) >> (number - 1) & 1}


# Settings that no other test gives a server.
GIVEN = (
    "--device=cpu",
    "--dtype=bfloat16",
    "--compile=off",
    "--max-audio-length-in-s=0.5",
    "--max-num-inference-steps=300",
    "--max-num-waveforms-per-prompt=2",
    "--guidance-interval=0.1,0.7",
    "--timestep-spacing=karras",
)


def test_a_drain_refuses_new_requests_and_finishes_those_inside(
    tiny_checkpoint: Path, fault_directory: Path, tmp_path: Path
) -> None:
    """As a job in the background of a shell, where Ctrl-C is for others and SIGTERM is obeyed."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with faults_found_in(fault_directory), local_server(tiny_checkpoint, tmp_path / "log", *GIVEN) as server:
        signal.signal(signal.SIGINT, previous)
        assert signal.SIGINT in ignored_signals(server.process.pid)
        idle = http.client.HTTPConnection("localhost", server.http_port)
        idle.request("GET", "/v2/health/ready")
        idle.getresponse().read()  # and keeps the connection, which Triton by itself would wait for
        with ThreadPoolExecutor(3) as pool, AudioLDM2Client(server.grpc_url, max_retries=0) as client:
            limits = client.server_info().limits
            assert (limits.max_audio_length_in_s, limits.max_num_waveforms_per_prompt) == (0.5, 2)
            assert limits.max_num_inference_steps == 300
            with held_steps(fault_directory):
                calls = start_calls(server, pool, LONG | {"audio_length_in_s": [0.5], "num_inference_steps": [60]})
                wait_for_requests(server, 3)
                server.process.send_signal(signal.SIGTERM)
                wait_until(lambda: health(server)[1]["state"] == "draining", "the drain")
                assert health(server)[0] == 503
                assert health(server, "/live")[0] == 200
                with pytest.raises(UnavailableError, match="shutting down"):
                    client.generate(**SHORT)
            results = [call.result(timeout=WAIT_IN_S) for call in calls]
        assert not any(isinstance(result, Exception) for result in results), results
        audio = results[0].as_numpy("audio")
        assert audio.shape == (1, 1, 8000)
        assert 0 < np.abs(audio).max() <= 1
        assert server.process.wait(timeout=WAIT_IN_S) == 0
        idle.close()


@pytest.mark.parametrize("signal_number", [signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_of_a_supervisor(signal_number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Whether it is asked to go while it starts, or killed with a stopped stage, after a first start that crashed."""
    ports = free_ports(4)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            serve_command(tiny_checkpoint, ports),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    server = server_on(process, ports, tmp_path / "log")
    if signal_number == signal.SIGHUP:  # while it starts
        family = wait_until(lambda: find_stages(process.pid), "the stages")
    else:
        wait_until(lambda: find_stages(process.pid), "the stages")
        triton(server).send_signal(signal.SIGABRT)
        assert process.stdout.readline().startswith("ready:")
        family = find_stages(process.pid)
        if signal_number == signal.SIGKILL:
            stage(server, "decoder").suspend()
    memory = shared_memory(server)
    everyone = [triton(server), *family]
    process.send_signal(signal_number)
    process.wait(timeout=WAIT_IN_S)
    process.stdout.close()
    assert process.returncode == (-9 if signal_number == signal.SIGKILL else 0), (tmp_path / "log").read_text()
    wait_until(lambda: not any(each.is_running() for each in everyone), "the server's processes to end")
    wait_until(lambda: not any(file.exists() for file in memory), "the shared memory to be removed")
    wait_until(lambda: not list(tmp_path.glob("audioldm2-triton-*")), "the folder to be removed")
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_a_second_sigterm_stops_at_once_and_says_what_was_lost(
    tiny_checkpoint: Path, fault_directory: Path, tmp_path: Path
) -> None:
    def stop_twice() -> None:
        with (
            faults_found_in(fault_directory),
            local_server(tiny_checkpoint, tmp_path / "log") as server,
            ThreadPoolExecutor(3) as pool,
            held_steps(fault_directory),
        ):
            calls = start_calls(server, pool)
            wait_for_requests(server, 3)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: health(server)[1]["state"] == "draining", "the drain")
            server.process.send_signal(signal.SIGTERM)
            assert all(isinstance(call.result(timeout=WAIT_IN_S), Exception) for call in calls)

    with pytest.raises(ServerError, match="requests inside"):
        stop_twice()

"""Outputs in system shared memory: the audio, or one error; never a write beyond the region, nor a lost request."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException, shared_memory

from metrics_page import is_idle, wait_for_metrics
from plain_requests import ADMIN_KEY, Stream, infer_inputs, whole
from serving.local_server import LocalServer

ROWS = {"prompt": [b"a dog"], "num_inference_steps": [2], "audio_length_in_s": [1.0], "seed": [1]}
SIZE = 4 * 16000
GUARD = b"\xa5" * 64  # behind the region that Triton may write to

Infer = Callable[[Any], Any]


@contextmanager
def region(client: Any, key: dict[str, str], size: int) -> Iterator[Any]:
    """A registered region `audio` of `size` bytes, in a file that has room for a guard behind it."""
    handle = shared_memory.create_shared_memory_region("audio", f"/audioldm2-test-{id(client)}", size + len(GUARD))
    try:
        shared_memory.set_shared_memory_region(handle, [np.frombuffer(GUARD, np.uint8)], offset=size)
        client.register_system_shared_memory("audio", f"/audioldm2-test-{id(client)}", size, headers=key)
        yield handle
        guard = shared_memory.get_contents_as_numpy(handle, np.uint8, [len(GUARD)], offset=size)
        assert guard.tobytes() == GUARD
    finally:
        unregister(client, key)
        shared_memory.destroy_shared_memory_region(handle)


def unregister(client: Any, key: dict[str, str]) -> None:
    """Give the region back. Triton holds it a moment longer than its answer takes to arrive, and refuses meanwhile."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.unregister_system_shared_memory("audio", headers=key)
        except InferenceServerException as error:
            if "currently in use" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def into_region(module: ModuleType, size: int) -> Any:
    output = module.InferRequestedOutput("audio")
    output.set_shared_memory("audio", size)
    return output


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, server: LocalServer) -> Iterator[tuple[ModuleType, Any, dict[str, str]]]:
    module, port, header = {
        "grpc": (grpc, server.grpc_port, "triton-grpc-protocol-admin-key"),
        "http": (http, server.http_port, "admin-key"),
    }[request.param]
    with module.InferenceServerClient(f"localhost:{port}") as connected:
        yield module, connected, {header: ADMIN_KEY}


@pytest.mark.parametrize("size", [SIZE, SIZE + 1000])
def test_audio_in_a_region_that_holds_it(size: int, client: tuple[ModuleType, Any, dict[str, str]]) -> None:
    module, connected, key = client
    inputs = infer_inputs(module, ROWS)
    right = connected.infer("audioldm2", inputs).as_numpy("audio")
    with region(connected, key, size) as handle:
        outputs = [into_region(module, size), module.InferRequestedOutput("seed_used")]
        answer = connected.infer("audioldm2", inputs, outputs=outputs)
        assert answer.as_numpy("seed_used").tolist() == [[1]]
        audio = shared_memory.get_contents_as_numpy(handle, np.float32, right.shape)
        np.testing.assert_allclose(audio, right, atol=1e-5)


@pytest.mark.parametrize("size", [SIZE - 1, 1])
def test_a_region_too_small_is_one_error(
    size: int, client: tuple[ModuleType, Any, dict[str, str]], server: LocalServer
) -> None:
    module, connected, key = client
    with region(connected, key, size), pytest.raises(InferenceServerException, match="64000 bytes to hold"):
        connected.infer("audioldm2", infer_inputs(module, ROWS), outputs=[into_region(module, size)])
    wait_for_metrics(server, is_idle, "the server to be idle")
    assert whole(server, ROWS)["audio"].shape == (1, 1, 16000)


def test_a_stream_into_a_region_too_small_is_one_error(server: LocalServer) -> None:
    key = {"triton-grpc-protocol-admin-key": ADMIN_KEY}
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as connected, region(connected, key, SIZE - 1):
        stream = Stream(server)
        try:
            stream.send(ROWS, outputs=[into_region(grpc, SIZE - 1), grpc.InferRequestedOutput("order")])
            with pytest.raises(InferenceServerException, match="64000 bytes to hold"):
                list(stream.responses())
        finally:
            stream.close()
    wait_for_metrics(server, is_idle, "the server to be idle")

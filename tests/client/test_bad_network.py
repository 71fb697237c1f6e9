"""Both clients over a bad network: slow and sliced answers are whole, cut ones are unavailable, swallowed ones late."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client, DeadlineExceededError, UnavailableError
from audioldm2_triton.transport import keepalive
from audioldm2_triton.transport.failures import OTHER_PROTOCOL
from contract_stand_in.stand_in_server import StandInServer
from trials.proxy import Proxy, Toxics, proxy

ARGUMENTS = {"prompt": "rain", "seed": 1, "audio_length_in_s": 2.0}


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: StandInServer) -> str:
    return server.urls[["grpc", "http"].index(request.param)]


@pytest.fixture
def between(url: str) -> Iterator[Proxy]:
    with proxy(int(url.rpartition(":")[2])) as made:
        yield made


@pytest.fixture
def proxied(url: str, between: Proxy) -> str:
    return f"{url.rpartition(':')[0]}:{between.port}"


def generate(kind: str, url: str, **arguments: Any) -> np.ndarray:
    if kind == "sync":
        with AudioLDM2Client(url, max_retries=0) as client:
            return client.generate(**{**ARGUMENTS, **arguments}).audio

    async def ask() -> np.ndarray:
        async with AsyncAudioLDM2Client(url, max_retries=0) as client:
            return (await client.generate(**{**ARGUMENTS, **arguments})).audio

    return asyncio.run(ask())


def streamed(kind: str, url: str) -> int:
    """The number of events of a stream."""
    if kind == "sync":
        with AudioLDM2Client(url) as client:
            return len(list(client.stream(**ARGUMENTS)))

    async def ask() -> int:
        async with AsyncAudioLDM2Client(url) as client:
            return len([event async for event in client.stream(**ARGUMENTS)])

    return asyncio.run(ask())


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("toxics", [Toxics(latency_in_s=0.02), Toxics(slicer_bytes=37)], ids=["latency", "slicer"])
def test_slow_and_sliced_answers_are_whole(kind: str, toxics: Toxics, url: str, between: Proxy, proxied: str) -> None:
    between.toxics = toxics
    assert np.array_equal(generate(kind, proxied), generate(kind, url))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("limit", [0, 1, 300, 3000, 100_000])
def test_a_cut_answer_is_unavailable(kind: str, limit: int, between: Proxy, proxied: str) -> None:
    """The answer has 128,000 bytes of audio; each connection is cut after so many."""
    between.toxics.limit_bytes = limit
    with pytest.raises(UnavailableError):
        generate(kind, proxied)
    if limit < 100_000:
        with pytest.raises(UnavailableError):
            streamed(kind, proxied)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_swallowed_answer_is_late(kind: str, between: Proxy, proxied: str) -> None:
    between.toxics.timeout = True
    with pytest.raises(DeadlineExceededError):
        generate(kind, proxied, timeout=0.3)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_grpc_server_that_vanishes_is_noticed(
    kind: str, server: StandInServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it works at a request without a timeout."""
    monkeypatch.setattr(keepalive, "IDLE_IN_S", 1)
    monkeypatch.setattr(keepalive, "PATIENCE_IN_S", 1)
    with proxy(int(server.urls[0].rpartition(":")[2])) as between, ThreadPoolExecutor(1) as pool:
        call = pool.submit(generate, kind, f"grpc://127.0.0.1:{between.port}", prompt="!watch /dev/null")
        time.sleep(1)
        between.toxics.timeout = True
        with pytest.raises(UnavailableError):
            call.result(timeout=60)


def tcp_timers(port: int) -> list[str]:
    """The kind of the timer of each connection to a port of this machine: 02 is TCP's keepalive."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [line[5].partition(":")[0] for line in lines if line[2].endswith(f":{port:04X}") and line[3] == "01"]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_http_connections_are_probed(kind: str, streams: bool, server: StandInServer) -> None:
    with proxy(int(server.urls[1].rpartition(":")[2])) as between, ThreadPoolExecutor(1) as pool:
        between.toxics.latency_in_s = 0.1
        call = pool.submit(streamed if streams else generate, kind, f"http://127.0.0.1:{between.port}")
        timers: list[str] = []
        while not call.done():
            timers += tcp_timers(between.port)
            time.sleep(0.02)
        call.result()
    assert "02" in timers


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_port_of_grpc_is_named(kind: str, server: StandInServer) -> None:
    port = server.urls[0].rpartition(":")[2]
    with pytest.raises(UnavailableError) as caught:
        generate(kind, f"http://localhost:{port}")
    assert str(caught.value) == f"http://localhost:{port}: {OTHER_PROTOCOL}"

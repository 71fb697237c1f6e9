"""Both clients over a bad network: slow and sliced answers are whole, cut ones are unavailable, swallowed ones late."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client, DeadlineExceededError, UnavailableError
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


def generate(kind: str, url: str, timeout: float | None = None) -> np.ndarray:
    if kind == "sync":
        with AudioLDM2Client(url, max_retries=0) as client:
            return client.generate(**ARGUMENTS, timeout=timeout).audio

    async def ask() -> np.ndarray:
        async with AsyncAudioLDM2Client(url, max_retries=0) as client:
            return (await client.generate(**ARGUMENTS, timeout=timeout)).audio

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
def test_the_port_of_grpc_is_named(kind: str, server: StandInServer) -> None:
    port = server.urls[0].rpartition(":")[2]
    with pytest.raises(UnavailableError) as caught:
        generate(kind, f"http://localhost:{port}")
    assert str(caught.value) == f"http://localhost:{port}: {OTHER_PROTOCOL}"

"""A client that outlives what it was made in: an event loop, or a process that forks."""

import asyncio
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client
from contract_stand_in.stand_in_server import StandInServer, stand_in_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInServer]:
    with stand_in_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize("protocol", [0, 1], ids=["grpc", "http"])
def test_one_client_in_two_event_loops(protocol: int, server: StandInServer) -> None:
    client = AsyncAudioLDM2Client(server.urls[protocol])

    async def generate() -> np.ndarray:
        return (await client.generate("rain", seed=3)).audio

    first, second = asyncio.run(generate()), asyncio.run(generate())
    assert np.array_equal(first, second)
    asyncio.run(client.close())


def _generate(client: AudioLDM2Client, to_parent: Connection) -> None:
    try:
        to_parent.send(client.generate("rain", seed=2).audio)
    except RuntimeError as error:
        to_parent.send(str(error))


@pytest.mark.parametrize("protocol", [0, 1], ids=["grpc", "http"])
def test_a_forked_child_is_told_and_its_parent_goes_on(protocol: int, server: StandInServer) -> None:
    with AudioLDM2Client(server.urls[protocol]) as client:
        expected = client.generate("rain", seed=1).audio
        from_child, to_parent = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_generate, args=(client, to_parent))
        child.start()
        own = [client.generate("rain", seed=1).audio for _ in range(20)]
        assert from_child.poll(60), "the child did not answer"
        sent = from_child.recv()
        child.join(60)
    assert all(np.array_equal(audio, expected) for audio in own)
    assert "forked process" in sent

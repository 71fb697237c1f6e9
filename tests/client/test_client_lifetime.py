"""A client that outlives what it was made in: an event loop, or a process that forks."""

import asyncio
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import pytest

from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client, Finished, Progress
from contract_stand_in.stand_in_server import StandInServer

# What a loop that has ended had opened is closed when it is collected. Python warns of that: here, not in a later test.
abandons_connections = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


@abandons_connections
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("protocol", [0, 1], ids=["grpc", "http"])
def test_one_client_in_two_event_loops(protocol: int, server: StandInServer) -> None:
    client = AsyncAudioLDM2Client(server.urls[protocol])

    async def generate() -> np.ndarray:
        return (await client.generate("rain", seed=3)).audio

    first, second = asyncio.run(generate()), asyncio.run(generate())
    assert np.array_equal(first, second)
    asyncio.run(client.close())


def in_a_fork(work: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    """Starts a child that sends what `work` does."""
    from_child, to_parent = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=work, args=(to_parent,))
    child.start()
    return child, from_child


def received(child: BaseProcess, from_child: Connection) -> object:
    assert from_child.poll(60), "the child did not answer"
    sent = from_child.recv()
    child.join(60)
    assert child.exitcode == 0
    return sent


def _generate(client: AudioLDM2Client, to_parent: Connection) -> None:
    try:
        to_parent.send(client.generate("rain", seed=2).audio)
    except RuntimeError as error:
        to_parent.send(str(error))


@pytest.mark.parametrize("protocol", [0, 1], ids=["grpc", "http"])
def test_a_forked_child_is_told_and_its_parent_goes_on(protocol: int, server: StandInServer) -> None:
    with AudioLDM2Client(server.urls[protocol]) as client:
        expected = client.generate("rain", seed=1).audio
        child, from_child = in_a_fork(partial(_generate, client))
        own = [client.generate("rain", seed=1).audio for _ in range(20)]
        sent = received(child, from_child)
    assert all(np.array_equal(audio, expected) for audio in own)
    assert "forked process" in sent


@pytest.mark.parametrize("protocol", [0, 1], ids=["grpc", "http"])
def test_a_child_that_is_forked_during_a_stream_takes_nothing_from_it(protocol: int, server: StandInServer) -> None:
    """The stream goes on only after the child has done all that it could do wrong: read, cancel, close."""
    with AudioLDM2Client(server.urls[protocol]) as client, AudioLDM2Client(server.urls[protocol]) as other:
        events = client.stream("!meet 2", seed=1)

        def use(to_parent: Connection) -> None:
            with pytest.raises(RuntimeError) as caught:
                next(events)
            events.close()
            client.close()
            to_parent.send(str(caught.value))

        first = next(events)
        assert isinstance(first, Progress)
        assert "forked process" in str(received(*in_a_fork(use)))
        with ThreadPoolExecutor(1) as pool:
            met = pool.submit(lambda: list(other.stream("!meet 2", seed=1)))
            last, of_other = list(events)[-1], met.result()[-1]
            assert isinstance(last, Finished)
            assert isinstance(of_other, Finished)
            assert np.array_equal(last.result.audio, of_other.result.audio)


@abandons_connections
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("protocol", [0, 1], ids=["grpc", "http"])
def test_a_forked_child_s_event_loop_is_told(protocol: int, server: StandInServer) -> None:
    client = AsyncAudioLDM2Client(server.urls[protocol])

    async def generate() -> np.ndarray:
        return (await client.generate("rain", seed=3)).audio

    def use(to_parent: Connection) -> None:
        with pytest.raises(RuntimeError) as caught:
            asyncio.run(generate())
        asyncio.run(client.close())
        to_parent.send(str(caught.value))

    first = asyncio.run(generate())
    assert "forked process" in str(received(*in_a_fork(use)))
    assert np.array_equal(first, asyncio.run(generate()))
    asyncio.run(client.close())

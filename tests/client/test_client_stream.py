"""Streaming by both clients over both protocols, against a real Triton with a model that stands in for AudioLDM 2."""

import asyncio
import contextlib
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client, Finished, Progress, contract, errors
from audioldm2_triton.transport import wire
from contract_stand_in.both_clients import Client, open_client
from contract_stand_in.stand_in_server import StandInServer, stand_in_server
from environments import python

ARGUMENTS: dict[str, Any] = {
    "negative_prompt": "噪音",
    "audio_length_in_s": 1.93,
    "num_inference_steps": 7,
    "guidance_scale": 2.3,
    "num_waveforms_per_prompt": 3,
    "seed": contract.MAX_SEED,
    "scheduler": "DDIMScheduler",
    "request_id": "a-b",
}

INTERRUPTED_SCRIPT = """
import sys
from audioldm2_triton import AudioLDM2Client
with AudioLDM2Client(sys.argv[1]) as client:
    if sys.argv[1].startswith("grpc"):
        print("started", flush=True)
        client.generate(sys.argv[2])
    else:
        client.generate(sys.argv[2], on_progress=lambda progress: print("started", flush=True))
"""


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: StandInServer) -> str:
    return f"{request.param}://{getattr(server, request.param)}"


@pytest.fixture
def client(kind: str, url: str) -> Iterator[Client]:
    with open_client(kind, url) as opened:
        yield opened


def wait_until_begun(file: Path) -> None:
    """Waits until the server is busy with `!watch`: over gRPC nothing else tells that the request has left."""
    deadline = time.monotonic() + 30
    while not file.with_name(f"{file.name}.begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outcome(file: Path) -> str:
    """What `!watch` has written, which is soon after a cancellation."""
    deadline = time.monotonic() + 10
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return file.read_text()


def test_a_stream_tells_of_every_step_and_ends_with_what_generate_gives(client: Client) -> None:
    events = client.stream("rain on a tin roof", **ARGUMENTS)
    assert events[:7] == [Progress(step, 7) for step in range(1, 8)]
    chunks, last = events[7:-1], events[-1]
    assert [(chunk.chunk, chunk.num_chunks) for chunk in chunks] == [(0, 3), (1, 3), (2, 3)]
    [expected] = client.generate(["rain on a tin roof"], **ARGUMENTS)
    # The stand-in's generation order is worst first.
    joined = np.concatenate([chunk.audio for chunk in chunks], axis=1)
    np.testing.assert_array_equal(joined, expected.audio[::-1])
    assert isinstance(last, Finished)
    np.testing.assert_array_equal(last.result.audio, expected.audio)
    np.testing.assert_array_equal(last.result.scores, expected.scores)
    for name in ("seed", "sampling_rate", "prompt", "duration_in_s"):
        assert getattr(last.result, name) == getattr(expected, name), name
    assert joined.dtype == last.result.audio.dtype == last.result.scores.dtype == np.float32
    for array in (chunks[0].audio, last.result.audio):
        array[0] *= 0.5  # the arrays are the caller's


def test_scores_are_there_where_they_are_asked_for(client: Client) -> None:
    assert client.stream("rain")[-1].result.scores is None
    assert client.stream("rain", return_scores=True)[-1].result.scores.shape == (1,)


def test_generate_with_on_progress_is_generate_that_tells(client: Client) -> None:
    seen: list[Progress] = []
    told = client.generate("rain", on_progress=seen.append, **ARGUMENTS)
    assert seen == [Progress(step, 7) for step in range(1, 8)]
    np.testing.assert_array_equal(told.audio, client.generate("rain", **ARGUMENTS).audio)


@pytest.mark.parametrize("prompt", [["rain"], ["rain", "wind"]])
def test_several_prompts_cannot_stream(client: Client, prompt: list[str]) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"^`prompt`: got '\d prompts' but expected one string"):
        client.generate(prompt, on_progress=print)
    with pytest.raises(errors.InvalidArgumentError, match=r"^`prompt`: got '\d prompts' but expected one string"):
        client.stream(prompt)


@pytest.mark.parametrize(
    ("command", "kind_of_error", "message"),
    [
        ("!fail INVALID_ARG `seed`: got -1 but", errors.InvalidArgumentError, "`seed`: got -1 but"),
        ("!fail UNAVAILABLE denoiser is full: 3", errors.UnavailableError, "{url}: denoiser is full: 3"),
        ("!fail CANCELLED cancelled by the client", errors.RequestCancelledError, "cancelled by the client"),
        ("!fail INTERNAL decoder failed:\n x", errors.InternalError, "decoder failed: x"),
        ("!late CANCELLED deadline exceeded: x", errors.DeadlineExceededError, "deadline exceeded: x"),
        ("!late INTERNAL decoder failed:\n x", errors.InternalError, "decoder failed: x"),
        ("!raise", errors.InternalError, "audioldm2_stream_0 failed: ValueError: an exception out of execute()"),
        ("!torn", errors.InternalError, "the server ended the stream before its last response"),
    ],
)
def test_failures_are_one_line_of_the_right_kind(
    client: Client, url: str, command: str, kind_of_error: type[Exception], message: str
) -> None:
    for call in (client.stream, lambda prompt: client.generate(prompt, on_progress=lambda _: None)):
        with pytest.raises(errors.AudioLDM2Error) as caught:
            call(command)
        assert type(caught.value) is kind_of_error
        assert str(caught.value) == message.format(url=url)


def test_a_timeout_reaches_the_server_as_its_deadline(client: Client) -> None:
    with pytest.raises(errors.DeadlineExceededError, match=r"^deadline exceeded: 250000 us$"):
        client.stream("!sleep 20", timeout=0.25)
    assert isinstance(client.stream("!sleep 0.01", timeout=5)[-1], Finished)


def test_a_server_that_minds_no_deadline_is_given_up(client: Client, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CLIENT_TIMEOUT_MARGIN_IN_S", 0.1)
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceededError, match=rf"no answer from {url} within 0.7 s"):
        client.stream("!deaf 6", timeout=0.7)
    assert time.monotonic() - start < 5.5
    assert isinstance(client.stream("rain", timeout=30)[-1], Finished)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_is_not_there_is_unavailable_by_its_url(
    kind: str, protocol: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = f"{protocol}://localhost:1"
    with open_client(kind, url) as present:
        info = present.server_info()
    for module in ("client", "aio"):
        monkeypatch.setattr(f"audioldm2_triton.{module}.read_server_info", lambda *_: info)
    with open_client(kind, gone) as client, pytest.raises(errors.UnavailableError, match=rf"^{gone}: .*[Cc]onnect"):
        client.stream("rain")


def test_without_the_stream_generate_does_and_the_rest_says_what_is_missing(
    client: Client, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "stream_of", lambda _: "another")
    assert not client.server_info().serves_stream
    assert client.generate("rain", seed=9).seed == 9
    with pytest.raises(errors.UnavailableError, match=rf"^{url}: .*'another' is not found"):
        client.stream("rain")
    with pytest.raises(errors.UnavailableError, match=rf"^{url}: .*'another' is not found"):
        client.generate("rain", on_progress=print)


@pytest.mark.parametrize("way", ["break", "exception", "close", "on_progress"])
def test_an_iteration_that_ends_early_cancels_on_the_server(url: str, way: str, tmp_path: Path) -> None:
    prompt = f"!watch {tmp_path / 'seen'}"

    def give_up(_: Progress) -> None:
        raise ZeroDivisionError

    with AudioLDM2Client(url) as client:
        events = client.stream(prompt)
        if way == "break":
            for _ in client.stream(prompt):
                break
        elif way == "close":
            next(events)
            events.close()
        elif way == "exception":
            with pytest.raises(ZeroDivisionError):
                deque(map(give_up, client.stream(prompt)))
        else:
            with pytest.raises(ZeroDivisionError):
                client.generate(prompt, on_progress=give_up)
        assert outcome(tmp_path / "seen") == "cancelled"
        assert client.generate("rain", seed=9).seed == 9


@pytest.mark.parametrize("way", ["break", "aclose", "task", "generate", "on_progress"])
def test_an_asyncio_iteration_that_ends_early_cancels_on_the_server(url: str, way: str, tmp_path: Path) -> None:
    prompt = f"!watch {tmp_path / 'seen'}"

    async def end_early() -> int:
        async with AsyncAudioLDM2Client(url) as client:
            started = asyncio.Event()

            async def iterate() -> None:
                async for _ in client.stream(prompt):
                    started.set()

            if way == "break":
                async for _ in client.stream(prompt):
                    break
            elif way == "aclose":
                async with contextlib.aclosing(client.stream(prompt)) as events:
                    await anext(events)
            else:
                generate = client.generate(prompt, on_progress=lambda _: started.set())
                plain = client.generate(prompt)
                calls = {"task": iterate(), "generate": plain, "on_progress": generate}
                task = asyncio.create_task(calls.pop(way))
                for call in calls.values():
                    call.close()
                if way == "generate":
                    await asyncio.to_thread(wait_until_begun, tmp_path / "seen")
                else:
                    await started.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            # Plain requests over HTTP are stopped only by their deadline.
            if way != "generate" or url.startswith("grpc"):
                assert await asyncio.to_thread(outcome, tmp_path / "seen") == "cancelled"
            return (await client.generate("rain", seed=9)).seed

    assert asyncio.run(end_early()) == 9


def test_an_interrupt_cancels_on_the_server(url: str, tmp_path: Path) -> None:
    command = [python("client"), "-c", INTERRUPTED_SCRIPT, url, f"!watch {tmp_path / 'seen'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        wait_until_begun(tmp_path / "seen")
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]
    assert outcome(tmp_path / "seen") == "cancelled"


def test_cancelling_one_stream_leaves_the_others(url: str) -> None:
    with AudioLDM2Client(url) as client:
        staying = client.stream("!sleep 0.5", **ARGUMENTS)
        next(staying)
        for _ in client.stream("!sleep 20"):
            break
        assert isinstance(list(staying)[-1], Finished)


def test_streams_leave_no_threads_behind(url: str) -> None:
    with AudioLDM2Client(url) as client:
        client.server_info()
        before = threading.active_count()
        for _ in range(3):
            for _ in client.stream("!sleep 20"):
                break
        deadline = time.monotonic() + 30
        while threading.active_count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_one_client_streams_in_many_threads_at_once(url: str) -> None:
    with AudioLDM2Client(url) as client, ThreadPoolExecutor(8) as pool:
        # Each is answered only when all of them are in flight.
        results = pool.map(lambda seed: list(client.stream("!meet 8", seed=seed))[-1].result, range(8))
    assert [result.seed for result in results] == list(range(8))


def test_one_asyncio_client_keeps_many_streams_in_flight(url: str) -> None:
    async def last(client: AsyncAudioLDM2Client, seed: int) -> Finished:
        return [event async for event in client.stream("!meet 8", seed=seed)][-1]

    async def meet() -> list[int]:
        async with AsyncAudioLDM2Client(url) as client:
            events = await asyncio.gather(*(last(client, seed) for seed in range(8)))
            return [event.result.seed for event in events]

    assert asyncio.run(meet()) == list(range(8))


def test_a_server_that_dies_ends_the_streams(tmp_path: Path) -> None:
    def watch(kind: str, url: str) -> str:
        with open_client(kind, url) as client, pytest.raises(errors.UnavailableError) as caught:
            client.stream("!sleep 20")
        return str(caught.value)

    with stand_in_server(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        kinds_and_urls = [(kind, url) for kind in ("sync", "async") for url in server.urls]
        watches = [pool.submit(watch, *item) for item in kinds_and_urls]
        time.sleep(2)
        assert not any(item.done() for item in watches)
        server.process.kill()
        for (_, url), item in zip(kinds_and_urls, watches, strict=True):
            assert item.result(10).startswith(f"{url}: ")

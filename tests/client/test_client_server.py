"""Both clients over both protocols against a real Triton, with a model that stands in for AudioLDM 2."""

import asyncio
import contextlib
import inspect
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import audioldm2_triton
from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client, ServerInfo, contract, errors
from audioldm2_triton.contract import Limits
from audioldm2_triton.transport import wire
from certificates import make_certificate
from contract_stand_in.both_clients import Client, open_client
from contract_stand_in.stand_in_audio import NATIVE_AUDIO_LENGTH_IN_S, SAMPLING_RATE, stand_in_audio, stand_in_scores
from contract_stand_in.stand_in_server import StandInServer, stand_in_server

ARGUMENTS: dict[str, Any] = {
    "negative_prompt": "噪音",
    "audio_length_in_s": 1.93,
    "num_inference_steps": 7,
    "guidance_scale": 2.3,
    "num_waveforms_per_prompt": 3,
    "seed": contract.MAX_SEED,
    "scheduler": "DDIMScheduler",
    "window_length_in_s": 2.56,
    "priority": "batch",
}


@contextlib.contextmanager
def tls_gateway(certificate: Path, address: str) -> Iterator[str]:
    """What Triton has not over HTTP: an address that speaks TLS and hands everything on to `address`."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(*address.split(":"))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(copy(reader, onward_writer), copy(onward_reader, writer))

    async def shut() -> None:
        gateway.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    loop = asyncio.new_event_loop()
    gateway = loop.run_until_complete(asyncio.start_server(hand_on, "localhost", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"localhost:{gateway.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(shut(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def bare_server(tmp_path_factory: pytest.TempPathFactory, certificate: Path) -> Iterator[StandInServer]:
    """A server that publishes nothing about itself, and speaks TLS over gRPC."""
    tls = (
        "--grpc-use-ssl=1",
        f"--grpc-server-cert={certificate}",
        f"--grpc-server-key={certificate.with_name('key.pem')}",
    )
    with stand_in_server(tmp_path_factory.mktemp("bare_server"), {"checkpoint": ""}, tls) as running:
        yield running


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


def expected_audio(prompt: str, *, return_scores: bool = True, **arguments: Any) -> np.ndarray:
    """What the stand-in answers for these arguments."""
    length = arguments.pop("audio_length_in_s")
    row = {"prompt": prompt, **arguments, "return_scores": return_scores}
    return stand_in_audio(row, arguments["num_waveforms_per_prompt"], length)


def test_every_argument_arrives_and_every_output_comes_back(client: Client) -> None:
    result = client.generate("rain on a tin roof", **ARGUMENTS)
    np.testing.assert_array_equal(result.audio, expected_audio("rain on a tin roof", **ARGUMENTS))
    np.testing.assert_array_equal(result.scores, stand_in_scores(3))
    assert (result.seed, result.sampling_rate, result.prompt) == (contract.MAX_SEED, 16000, "rain on a tin roof")
    assert result.audio.dtype == result.scores.dtype == np.float32
    assert result.duration_in_s == 1.93
    result.audio[0] *= 0.5  # the arrays are the caller's


def test_defaults(client: Client) -> None:
    result = client.generate("rain")
    assert result.scores is None
    assert result.audio.shape == (1, int(NATIVE_AUDIO_LENGTH_IN_S * SAMPLING_RATE))
    again = client.generate("rain", seed=result.seed)
    np.testing.assert_array_equal(again.audio, result.audio)
    assert client.generate("rain").seed != result.seed


def test_rows_of_a_request_are_what_requests_of_their_own_give(client: Client) -> None:
    prompts = [f"prompt {index}" for index in range(8)]
    seeds = list(range(8))
    results = client.generate(prompts, seed=seeds, return_scores=[seed % 2 == 0 for seed in seeds])
    assert [result.prompt for result in results] == prompts
    for prompt, seed, result in zip(prompts, seeds, results, strict=True):
        alone = client.generate(prompt, seed=seed, return_scores=seed % 2 == 0)
        np.testing.assert_array_equal(result.audio, alone.audio)
        assert (result.scores is None) == (alone.scores is None) == (seed % 2 == 1)
        assert result.audio.base is None  # does not keep its neighbours' memory


def test_one_prompt_in_a_sequence_gives_a_list(client: Client) -> None:
    assert [result.prompt for result in client.generate(("rain",), seed=3)] == ["rain"]


def test_server_info(client: Client) -> None:
    limits, models = Limits(30, 100, 4), ("audioldm2", "music_audioldm2")
    assert client.server_info() == ServerInfo(
        *(limits, NATIVE_AUDIO_LENGTH_IN_S, SAMPLING_RATE, contract.SCHEDULERS[:3], "stand-in", 8, True), models=models
    )


@pytest.mark.parametrize(
    ("command", "kind_of_error", "message"),
    [
        ("!fail INVALID_ARG `seed`: got -1", errors.InvalidArgumentError, "`seed`: got -1"),
        ("!fail UNAVAILABLE denoiser is full", errors.UnavailableError, "{url}: denoiser is full"),
        ("!fail CANCELLED cancelled by the client", errors.RequestCancelledError, "cancelled by the client"),
        ("!fail CANCELLED deadline exceeded: x", errors.DeadlineExceededError, "deadline exceeded: x"),
        ("!fail INTERNAL decoder failed:\n x", errors.InternalError, "decoder failed: x"),
        ("!raise", errors.InternalError, "stand_in_0 failed: ValueError: an exception out of execute()"),
    ],
)
@pytest.mark.parametrize("request_id", ["", "a-b"])
def test_failures_are_one_line_of_the_right_kind(
    client: Client, url: str, command: str, kind_of_error: type[Exception], message: str, request_id: str
) -> None:
    with pytest.raises(errors.AudioLDM2Error) as caught:
        client.generate([command], request_id=request_id)  # a sequence, which goes to the ensemble over gRPC too
    assert type(caught.value) is kind_of_error
    assert str(caught.value) == message.format(url=url)


def test_a_timeout_reaches_the_server_as_its_deadline(client: Client) -> None:
    with pytest.raises(errors.DeadlineExceededError, match=r"^deadline exceeded: 250000 us$"):
        client.generate(["!sleep 20"], timeout=0.25)
    assert client.generate("!sleep 0.01", timeout=5).num_waveforms == 1


def test_a_server_that_minds_no_deadline_is_given_up(client: Client, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CLIENT_TIMEOUT_MARGIN_IN_S", 0.1)
    client.server_info()  # without a timeout, which must not stay
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceededError, match=rf"no answer from {url} within 1 s"):
        client.generate(["!deaf 6"], timeout=1)
    assert time.monotonic() - start < 5.5
    # The late answer is nobody's.
    result = client.generate("rain", timeout=30, **ARGUMENTS)
    np.testing.assert_array_equal(result.audio, expected_audio("rain", **ARGUMENTS))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_is_not_there_is_unavailable_by_its_url(kind: str, protocol: str) -> None:
    url = f"{protocol}://localhost:1"
    with open_client(kind, url) as client, pytest.raises(errors.UnavailableError, match=rf"^{url}: .*[Cc]onnect"):
        client.generate("rain")


def test_a_server_without_the_model_is_unavailable(kind: str, url: str) -> None:
    with (
        open_client(kind, url, model="another") as client,
        pytest.raises(errors.UnavailableError, match="'another' is not found"),
    ):
        client.server_info()


def test_one_client_serves_many_threads_at_once(url: str) -> None:
    threads = 8
    with AudioLDM2Client(url) as client, ThreadPoolExecutor(threads) as pool:
        # Each is answered only when all of them are in flight.
        meetings = list(pool.map(lambda seed: client.generate(f"!meet {threads}", seed=seed), range(threads)))
        results = list(pool.map(lambda seed: client.generate("rain", seed=seed), range(40)))
    assert [result.seed for result in meetings] == list(range(threads))
    for seed, result in enumerate(results):
        row = {**ARGUMENTS, "negative_prompt": "", "audio_length_in_s": NATIVE_AUDIO_LENGTH_IN_S, "seed": seed}
        row |= {"num_inference_steps": 20, "guidance_scale": 3.5, "num_waveforms_per_prompt": 1}
        row |= {"scheduler": contract.DEFAULT_SCHEDULER, "window_length_in_s": 0.0, "priority": "interactive"}
        np.testing.assert_array_equal(result.audio, expected_audio("rain", return_scores=False, **row))


def test_one_asyncio_client_keeps_many_requests_in_flight(url: str) -> None:
    async def meet() -> list[int]:
        async with AsyncAudioLDM2Client(url) as client:
            results = await asyncio.gather(*(client.generate("!meet 8", seed=seed) for seed in range(8)))
            return [result.seed for result in results]

    assert asyncio.run(meet()) == list(range(8))


def test_a_closed_client_says_so(url: str) -> None:
    client = AudioLDM2Client(url)
    client.server_info()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("rain")


def test_closing_does_not_wait_for_other_threads(url: str) -> None:
    client = AudioLDM2Client(url)
    used, done = threading.Event(), threading.Event()

    def use() -> None:
        client.server_info()
        used.set()
        done.wait(10)

    thread = threading.Thread(target=use)
    thread.start()
    assert used.wait(10)
    start = time.monotonic()
    client.close()
    assert time.monotonic() - start < 5
    done.set()
    thread.join()


def test_the_length_is_the_servers_where_it_publishes_none(kind: str, bare_server: StandInServer) -> None:
    with open_client(kind, f"http://{bare_server.http}") as client:
        info = client.server_info()
        assert (info.limits, info.native_audio_length_in_s, info.sampling_rate) == (Limits(), None, None)
        assert client.generate("rain").duration_in_s == NATIVE_AUDIO_LENGTH_IN_S


def test_grpc_over_tls(kind: str, bare_server: StandInServer, certificate: Path) -> None:
    url = f"grpcs://{bare_server.grpc}"
    with open_client(kind, url, root_certificates=certificate) as client:
        assert client.generate(["rain"], seed=5)[0].seed == 5
        assert client.stream("rain", seed=5)[-1].result.seed == 5
    with open_client(kind, url) as client, pytest.raises(errors.UnavailableError, match=rf"^{url}: "):
        client.generate("rain")


def test_https_by_way_of_a_gateway(kind: str, bare_server: StandInServer, certificate: Path) -> None:
    with tls_gateway(certificate, bare_server.http) as address:
        url = f"https://{address}"
        with open_client(kind, url, root_certificates=certificate) as client:
            assert client.generate(["rain"], seed=5)[0].seed == 5
            assert client.stream("rain", seed=5)[-1].result.seed == 5
        with open_client(kind, url) as client, pytest.raises(errors.UnavailableError, match=rf"^{url}: .*certificate"):
            client.generate("rain")


def test_the_two_clients_are_twins() -> None:
    for name in ("__init__", "generate", "stream", "server_info", "close"):
        signatures = [
            inspect.signature(getattr(twin, name)).replace(return_annotation=None)
            for twin in (AudioLDM2Client, AsyncAudioLDM2Client)
        ]
        assert signatures[0] == signatures[1], name


def test_all_names_that_the_package_promises_are_there() -> None:
    for name in audioldm2_triton.__all__:
        assert getattr(audioldm2_triton, name).__name__ == name

"""A server with TLS over gRPC and an API key: who has the key is served, by every way, and nobody else."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from audioldm2_triton import (
    AsyncAudioLDM2Client,
    AudioLDM2Client,
    Finished,
    PermissionDeniedError,
    UnavailableError,
)
from certificates import make_certificate
from serving.local_server import LocalServer, local_server
from serving.loopback import read_page

KEY = "open sesame"
SHORT = {"prompt": "a dog", "audio_length_in_s": 0.3, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def guarded(
    certificate: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    tls = (
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={certificate}",
        f"--grpc-server-key={certificate.with_name('key.pem')}",
    )
    log = tmp_path_factory.mktemp("guarded") / "log"
    with local_server(tiny_checkpoint, log, f"--api-key={KEY}", "--", *tls) as server:
        yield server


@pytest.fixture(params=["grpcs", "http"])
def url(request: pytest.FixtureRequest, guarded: LocalServer) -> str:
    return f"{request.param}://localhost:{guarded.grpc_port if request.param == 'grpcs' else guarded.http_port}"


def test_the_key_opens_every_way(url: str, certificate: Path) -> None:
    options = {"root_certificates": certificate, "api_key": KEY, "max_retries": 0}
    with AudioLDM2Client(url, **options) as client:
        assert client.generate(**SHORT).audio.shape == (1, 4800)
        assert [result.audio.shape for result in client.generate(**{**SHORT, "prompt": ["a", "b"]})] == [(1, 4800)] * 2
        *_, last = client.stream(**SHORT)
        assert isinstance(last, Finished)

    async def ask() -> None:
        async with AsyncAudioLDM2Client(url, **options) as client:
            assert (await client.generate(**SHORT)).audio.shape == (1, 4800)
            events = [event async for event in client.stream(**SHORT)]
            assert isinstance(events[-1], Finished)

    asyncio.run(ask())


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_key_nothing_opens(key: str, url: str, certificate: Path) -> None:
    # Were it sent again, as what is unavailable, this would take minutes.
    options = {"root_certificates": certificate, "api_key": key, "max_retries": 100}
    with AudioLDM2Client(url, **options) as client, pytest.raises(PermissionDeniedError, match="restricted"):
        client.generate(**SHORT)

    async def ask() -> None:
        async with AsyncAudioLDM2Client(url, **options) as client:
            await client.generate(**SHORT)

    with pytest.raises(PermissionDeniedError, match="restricted"):
        asyncio.run(ask())


def test_the_environment_has_the_key(url: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUDIOLDM2_API_KEY", KEY)
    with AudioLDM2Client(url, root_certificates=certificate) as client:
        assert client.server_info().sampling_rate == 16000


def test_without_tls_or_with_an_unknown_certificate_there_is_no_connection(guarded: LocalServer) -> None:
    for url in (f"grpc://localhost:{guarded.grpc_port}", f"grpcs://localhost:{guarded.grpc_port}"):
        with AudioLDM2Client(url, api_key=KEY, max_retries=0) as client, pytest.raises(UnavailableError):
            client.server_info(timeout=20)


def test_probes_need_no_key(guarded: LocalServer) -> None:
    assert read_page(guarded.health_port, "/ready", 10)
    assert read_page(guarded.http_port, "/v2/health/ready", 10) == b""
    assert b"audioldm2_stage_requests" in read_page(guarded.metrics_port, "/metrics", 10)

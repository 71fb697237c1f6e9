"""Each request has one line in the server's log, with its id: done, or why it failed, by every way."""

import pytest

from audioldm2_triton import AudioLDM2Client, InvalidArgumentError
from serving.local_server import LocalServer
from supervised_server import wait_until

SHORT = {"audio_length_in_s": 0.2, "num_inference_steps": 1}


def lines(server: LocalServer, request_id: str) -> list[str]:
    return [line for line in server.log.read_text(errors="replace").splitlines() if f"'{request_id}'" in line]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("prompt", ["rain", ["rain"]], ids=["stream", "ensemble"])
def test_one_line_says_how_a_request_ended(prompt: str | list[str], protocol: str, server: LocalServer) -> None:
    name = f"{protocol}-{type(prompt).__name__}"
    with AudioLDM2Client(server.grpc_url if protocol == "grpc" else server.http_url) as client:
        client.generate(prompt, **SHORT, request_id=f"good-{name}")
        with pytest.raises(InvalidArgumentError):
            client.generate(prompt, **SHORT, scheduler="Euler", request_id=f"bad-{name}")
    wait_until(lambda: lines(server, f"good-{name}") and lines(server, f"bad-{name}"), "the lines")
    (good,), (bad,) = lines(server, f"good-{name}"), lines(server, f"bad-{name}")
    assert f"request 'good-{name}' is done" in good
    assert f"request 'bad-{name}' failed: InvalidArgumentError: `scheduler`: got 'Euler'" in bad

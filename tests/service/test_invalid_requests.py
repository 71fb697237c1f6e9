"""Every refusal names the argument, what was given and what is accepted; the server stays up."""

import json
import struct
import threading
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from audioldm2_triton import contract
from plain_requests import infer_inputs
from serving.local_server import LocalServer

# Each argument, a value that is refused, and what the message must say of the given and of the accepted.
REFUSED = [
    ("prompt", b"", "''", "not blank"),
    ("prompt", b" \n\t", r"' \n\t'", "not blank"),
    ("prompt", b"\xff\xfe", r"b'\xff\xfe'", "UTF-8"),
    ("prompt", b"x" * 2001, "'xxx", "at most 2000 characters, not 2001"),
    ("negative_prompt", b"\xff", r"b'\xff'", "UTF-8"),
    ("negative_prompt", b"x" * 2001, "'xxx", "at most 2000 characters, not 2001"),
    ("audio_length_in_s", 0.0999, "0.0999", "0.1 to 300"),
    ("audio_length_in_s", 300.01, "300.01", "0.1 to 300"),
    ("audio_length_in_s", -1, "-1.0", "0.1 to 300"),
    ("audio_length_in_s", np.nan, "nan", "finite"),
    ("audio_length_in_s", np.inf, "inf", "finite"),
    ("num_inference_steps", 0, "0", "1 to 200"),
    ("num_inference_steps", 201, "201", "1 to 200"),
    ("num_inference_steps", -5, "-5", "1 to 200"),
    ("guidance_scale", -0.1, "-0.1", "0 to 50"),
    ("guidance_scale", 50.1, "50.1", "0 to 50"),
    ("guidance_scale", np.nan, "nan", "finite"),
    ("guidance_scale", -np.inf, "-inf", "finite"),
    ("num_waveforms_per_prompt", 0, "0", "1 to 8"),
    ("num_waveforms_per_prompt", 9, "9", "1 to 8"),
    ("seed", -1, "-1", "0 to 9223372036854775807"),
    ("window_length_in_s", 0.5, "0.5", "0 for no windows, or a finite number of seconds from 0.64 to 300"),
    ("window_length_in_s", np.nan, "nan", "finite"),
    ("priority", b"urgent", "'urgent'", "one of interactive, batch"),
    ("priority", b"", "''", "one of interactive, batch"),
    ("priority", b"\xff", r"b'\xff'", "UTF-8"),
    ("scheduler", b"PNDMScheduler", "'PNDMScheduler'", "DPMSolverMultistepScheduler"),
    ("scheduler", b"", "''", "DPMSolverMultistepScheduler"),
    ("scheduler", b"\xff", r"b'\xff'", "UTF-8"),
    (
        "audio_format",
        b"aac",
        "'aac'",
        "one of wav, wav24, wavfloat, flac, flac24, ogg, opus, mp3, for JSON",
    ),
    ("audio_format", b";base64", "';base64'", "one of wav, wav24"),
    ("audio_format", b"wav;base64;base64", "'wav;base64;base64'", "one of wav, wav24"),
]


def refusal(server: LocalServer, protocol: str, rows: dict) -> InferenceServerException:
    module, port = (grpc, server.grpc_port) if protocol == "grpc" else (http, server.http_port)
    with (
        module.InferenceServerClient(f"localhost:{port}") as client,
        pytest.raises(InferenceServerException) as caught,
    ):
        client.infer(contract.ENSEMBLE, infer_inputs(module, rows))
    return caught.value


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(("argument", "value", "given", "accepted"), REFUSED)
def test_value_is_refused(
    argument: str, value: object, given: str, accepted: str, protocol: str, server: LocalServer
) -> None:
    error = refusal(server, protocol, {"prompt": [b"a dog"], argument: [value]})
    assert error.status() == ("StatusCode.INVALID_ARGUMENT" if protocol == "grpc" else "400")
    message = error.message()
    assert f"`{argument}`: got {given}" in message
    assert accepted in message.partition("but expected")[2]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("argument", "values", "given"),
    [
        ("audio_length_in_s", [1.0, 2.0], "[1.0, 2.0]"),
        ("num_waveforms_per_prompt", [1, 2], "[1, 2]"),
        ("priority", [b"batch", b"interactive"], "['batch', 'interactive']"),
        ("audio_format", [b"wav", b"ogg"], "['wav', 'ogg']"),
    ],
)
def test_rows_that_must_agree(argument: str, values: list, given: str, server: LocalServer) -> None:
    message = refusal(server, "grpc", {"prompt": [b"a", b"b"], argument: values}).message()
    assert f"`{argument}`: got {given} but expected the same value" in message


def test_too_many_rows(server: LocalServer) -> None:
    error = refusal(server, "grpc", {"prompt": [b"a"] * 9})
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "batch-size must be <= 8" in error.message()


def test_one_bad_row_refuses_its_request(server: LocalServer) -> None:
    message = refusal(server, "grpc", {"prompt": [b"a", b"b"], "num_inference_steps": [3, 0]}).message()
    assert "`num_inference_steps`: got 0" in message


def test_generate_endpoint_refuses_with_the_same_words(server: LocalServer) -> None:
    body = json.dumps({"prompt": "a dog", "num_inference_steps": 0}).encode()
    url = f"{server.http_url}/v2/models/audioldm2/generate"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, body))
    assert caught.value.code == 400
    assert "`num_inference_steps`: got 0 but expected an integer from 1 to 200" in caught.value.read().decode()


@pytest.mark.parametrize("path", ["audioldm2/generate", "audioldm2_stream/generate_stream"])
def test_a_misspelt_field_is_refused(path: str, server: LocalServer) -> None:
    body = {"prompt": "a dog", "audio_length_in_s": 0.2, "num_inference_step": 2, "comment": "mine"}
    url = f"{server.http_url}/v2/models/{path}"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()))
    said = caught.value.read().decode()
    assert "got 'num_inference_step' but expected an input, such as num_inference_steps" in said


def test_extremes_that_are_accepted(server: LocalServer) -> None:
    accepted = {
        "prompt": ["x" * 2000],
        "negative_prompt": ["y" * 2000],
        "audio_length_in_s": [0.1],
        "num_inference_steps": [1],
        "guidance_scale": [50.0],
        "num_waveforms_per_prompt": [8],
        "seed": [contract.MAX_SEED],
        "return_scores": [False],
        "priority": ["batch"],
    }
    encoded = {name: [v.encode() if isinstance(v, str) else v for v in values] for name, values in accepted.items()}
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        result = client.infer(contract.ENSEMBLE, infer_inputs(grpc, encoded))
    assert result.as_numpy("audio").shape == (1, 8, 1600)
    assert result.as_numpy("seed_used")[0, 0] == contract.MAX_SEED
    assert result.as_numpy("score").all(), "with several waveforms the scores are always there"


def test_a_text_shorter_than_it_says_harms_no_other(server: LocalServer) -> None:
    """Triton passes such a text on, and the Python backend then fails all that are in its batch."""
    # With the same inputs as the others: Triton batches no others with them.
    lies = infer_inputs(grpc, {"prompt": [b"abcdef"], "seed": [1]})
    lies[0]._raw_content = struct.pack("<I", 14113264) + b"abcdef"  # nothing public sends a false length
    done = threading.Event()

    def flood(_: int) -> Counter[str]:
        refusals: Counter[str] = Counter()
        with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
            while not done.is_set():
                with pytest.raises(InferenceServerException, match="incomplete string data") as caught:
                    client.infer("text_conditioning", lies)
                refusals[caught.value.status()] += 1
        return refusals

    def valid(number: int) -> int:
        with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
            inputs = infer_inputs(grpc, {"prompt": [f"a dog {number % 4}".encode()], "seed": [number]})
            return int(client.infer("text_conditioning", inputs).as_numpy("seed")[0, 0])

    with ThreadPoolExecutor(4) as liars, ThreadPoolExecutor(8) as others:
        floods = liars.map(flood, range(4))
        try:
            assert list(others.map(valid, range(100))) == list(range(100))
        finally:
            done.set()
        assert sum(floods, Counter()).keys() == {"StatusCode.INVALID_ARGUMENT"}

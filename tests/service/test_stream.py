"""`audioldm2_stream` on the real server: progress, audio in chunks and scores of what `audioldm2` gives at once."""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc

from audioldm2_triton import contract
from plain_requests import WAIT_IN_S, Response, Stream, check_responses, streamed, whole
from serving.local_server import LocalServer
from supervised_server import wait_until

LONG = {"prompt": [b"a dog"], "num_inference_steps": [200], "audio_length_in_s": [2.0], "seed": [1]}  # some seconds

# The length in s, how many chunks it takes, and further arguments. 0.915 s is off the 10 ms grid: silence fills it up.
CASES = [
    (0.1, 1, {"num_waveforms_per_prompt": [1], "num_inference_steps": [1]}),
    (0.915, 1, {"num_waveforms_per_prompt": [3], "num_inference_steps": [2]}),
    (3.0, 1, {"num_waveforms_per_prompt": [1], "num_inference_steps": [2], "return_scores": [True]}),
    (3.107, 2, {"num_waveforms_per_prompt": [3], "num_inference_steps": [2], "guidance_scale": [1.0]}),
    (5.7777, 3, {"num_waveforms_per_prompt": [2], "num_inference_steps": [2], "negative_prompt": [b"noise"]}),
    (10.24, 4, {"num_waveforms_per_prompt": [1], "num_inference_steps": [1]}),
]


@pytest.mark.parametrize(("length", "num_chunks", "arguments"), CASES, ids=[str(case[0]) for case in CASES])
def test_stream_equals_the_ensemble_bit_for_bit(
    length: float, num_chunks: int, arguments: dict, server: LocalServer
) -> None:
    rows = {"prompt": [b"A hammer hits a wooden surface"], "audio_length_in_s": [length], "seed": [11], **arguments}
    expected = whole(server, rows)
    result = check_responses(streamed(server, rows), arguments["num_inference_steps"][0], num_chunks)
    assert result["audio"].shape == (1, arguments["num_waveforms_per_prompt"][0], int(length * 16000))
    order = result["order"][0]
    assert sorted(order) == list(range(len(order)))
    np.testing.assert_array_equal(result["audio"][:, order], expected["audio"])
    for name in ("score", "seed_used", "sampling_rate"):
        np.testing.assert_array_equal(result[name], expected[name])
    scored = len(order) > 1 or "return_scores" in arguments
    assert bool(result["score"].all()) == scored


def test_waveforms_come_in_generation_order(server: LocalServer) -> None:
    """The first waveform is the one that the seed gives alone, wherever it ranks."""
    rows = {"prompt": [b"A dog barks"], "audio_length_in_s": [0.5], "num_inference_steps": [2]}
    orders = set()
    for seed in range(4):
        result = check_responses(streamed(server, {**rows, "seed": [seed], "num_waveforms_per_prompt": [3]}), 2, 1)
        alone = check_responses(streamed(server, {**rows, "seed": [seed]}), 2, 1)
        np.testing.assert_allclose(result["audio"][:, :1], alone["audio"], atol=1e-4)
        orders.add(tuple(result["order"][0].tolist()))
    assert len(orders) > 1, "the same order every time: nothing was told apart"


def test_defaults_and_a_drawn_seed(server: LocalServer) -> None:
    rows = {"prompt": [b"rain"], "num_inference_steps": [1]}
    results = [check_responses(streamed(server, rows), 1, 4) for _ in range(2)]
    seeds = [int(result["seed_used"][0, 0]) for result in results]
    assert seeds[0] != seeds[1]
    assert max(seeds) < 2**32  # no two that PyTorch takes for the same
    np.testing.assert_array_equal(
        results[0]["audio"], whole(server, {**rows, "seed": seeds[:1]})["audio"], "the seed told is not the seed used"
    )


@pytest.mark.parametrize(
    ("scheduler", "steps", "evaluations"),
    [("HeunDiscreteScheduler", 5, 9), ("KDPM2DiscreteScheduler", 1, 1), ("DDIMScheduler", 40, 40)],
)
def test_progress_counts_every_evaluation_once(
    scheduler: str, steps: int, evaluations: int, server: LocalServer
) -> None:
    rows = {"prompt": [b"rain"], "scheduler": [scheduler.encode()], "audio_length_in_s": [0.1], "seed": [1]}
    check_responses(streamed(server, {**rows, "num_inference_steps": [steps]}), evaluations, 1)


def test_progress_comes_while_the_denoiser_works(server: LocalServer) -> None:
    with closing(Stream(server)) as stream:
        stream.send({**LONG, "num_inference_steps": [30]})
        times = [time.perf_counter() for tensors in stream.responses() if "step" in tensors]
    assert len(times) == 30
    gaps = np.diff(times)
    assert np.median(gaps) > 0.25 * (times[-1] - times[0]) / 29, "the steps came in heaps"


def test_two_requests_of_one_stream_run_together(server: LocalServer) -> None:
    rows = {**LONG, "num_inference_steps": [30]}
    with closing(Stream(server)) as stream:
        for seed in (1, 2):
            stream.send({**rows, "seed": [seed]}, request_id=str(seed))
        arrived: dict[str, list[Response]] = {"1": [], "2": []}
        sequence = []
        ended = 0
        while ended < 2:
            name, tensors, last = stream.next()
            arrived[name].append(tensors)
            sequence.append(name)
            ended += last
    assert sequence.index("2") < len(sequence) // 2, "the second waited for the first"
    turns = sum(a != b for a, b in pairwise(sequence))
    assert turns > 20, f"{sequence} are not interleaved"
    for name, responses in arrived.items():
        result = check_responses(responses, 30, 1)
        expected = whole(server, {**rows, "seed": [int(name)]})["audio"]
        np.testing.assert_allclose(result["audio"], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "value"), [("prompt", b" "), ("num_inference_steps", 0), ("scheduler", b"PNDM"), ("seed", -1)]
)
def test_refusals_have_the_ensembles_words_and_leave_the_stream_usable(
    argument: str, value: object, server: LocalServer
) -> None:
    good = {"prompt": [b"a dog"], "num_inference_steps": [1], "audio_length_in_s": [0.1], "seed": [1]}
    bad = {**good, argument: [value]}
    with pytest.raises(grpc.InferenceServerException) as expected:
        whole(server, bad)
    with closing(Stream(server)) as stream:
        stream.send(bad)
        with pytest.raises(grpc.InferenceServerException) as caught:
            stream.next()
        stream.send(good)
        check_responses(list(stream.responses()), 1, 1)
    assert f"`{argument}`: got" in caught.value.message()
    in_stream = caught.value.message().removeprefix("INVALID_ARG: ")
    assert expected.value.message().endswith(in_stream)
    assert in_stream != caught.value.message()


def counter(server: LocalServer, outcome: str) -> int:
    with urllib.request.urlopen(f"http://localhost:{server.metrics_port}/metrics") as page:
        lines = page.read().decode()
    return sum(int(n) for n in re.findall(rf'audioldm2_requests_total{{.*outcome="{outcome}".*}} (\d+)', lines))


def check_cancelled(server: LocalServer, before: int) -> None:
    # A request that goes on to its end is never counted, however long this waits.
    deadline = time.monotonic() + 30
    while counter(server, "cancelled") == before:
        assert time.monotonic() < deadline, "the denoiser was not told"
        time.sleep(0.02)


def test_a_cancelled_stream_ends_its_denoising(server: LocalServer) -> None:
    before = counter(server, "cancelled")
    with closing(Stream(server)) as stream:
        stream.send(LONG)
        assert next(stream.responses())["num_steps"].tolist() == [[200]]
        stream.cancel()
    check_cancelled(server, before)


def generate_stream(server: LocalServer, **arguments: object) -> Any:
    url = f"{server.http_url}/v2/models/{contract.STREAM}/generate_stream"
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(arguments).encode()), timeout=WAIT_IN_S)


def events(response: Any) -> Iterator[dict]:
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def test_an_http_client_that_leaves_ends_its_denoising(server: LocalServer) -> None:
    before = counter(server, "cancelled")
    with generate_stream(server, prompt="a dog", num_inference_steps=200, audio_length_in_s=2.0) as response:
        assert next(events(response))["num_steps"] == 200
    check_cancelled(server, before)


def test_server_sent_events_have_the_same_audio(server: LocalServer) -> None:
    arguments = {"prompt": "a dog", "num_inference_steps": 2, "audio_length_in_s": 3.2, "seed": 5}
    with generate_stream(server, num_waveforms_per_prompt=2, **arguments) as response:
        *others, last = events(response)
    assert [(event["step"], event["num_steps"]) for event in others[:2]] == [(1, 2), (2, 2)]
    chunks = [(event["chunk"], event["num_chunks"], event["sampling_rate"]) for event in others[2:]]
    assert chunks == [(0, 2, 16000), (1, 2, 16000)]
    audio = np.concatenate([np.array(event["audio"], np.float32).reshape(2, -1) for event in others[2:]], axis=1)
    rows = {name: [value.encode() if isinstance(value, str) else value] for name, value in arguments.items()}
    expected = whole(server, {**rows, "num_waveforms_per_prompt": [2]})
    np.testing.assert_array_equal(audio[last["order"]], expected["audio"][0])
    np.testing.assert_array_equal(np.array(last["score"], np.float32), expected["score"][0])


def test_generate_stream_refuses_with_the_same_words(server: LocalServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        generate_stream(server, prompt="a dog", num_inference_steps=0)
    assert caught.value.code == 400
    assert "`num_inference_steps`: got 0 but expected an integer from 1 to 200" in caught.value.read().decode()


def grpc_failure(server: LocalServer, timeout_us: int) -> str:
    with closing(Stream(server)) as stream:
        stream.send(LONG, timeout=timeout_us)
        with pytest.raises(grpc.InferenceServerException) as caught:
            list(stream.responses())
    message: str = caught.value.message()
    return message


def http_failure(server: LocalServer, timeout_us: int) -> str:
    arguments = {"prompt": "a dog", "num_inference_steps": 200, "audio_length_in_s": 2.0, "timeout": timeout_us}
    try:
        with generate_stream(server, **arguments) as response:
            *_, last = events(response)
    except urllib.error.HTTPError as refusal:  # before the first step
        *_, last = events(refusal)
    message: str = last["error"]
    return message


@pytest.mark.parametrize("failure", [grpc_failure, http_failure])
def test_a_timeout_ends_the_stream(failure: Callable[[LocalServer, int], str], server: LocalServer) -> None:
    for timeout_in_s in (0.4, 1.2, 3.6):  # on a slow machine the first may be over before the request steps
        before = counter(server, "deadline_exceeded")
        start = time.monotonic()
        message = failure(server, int(1e6 * timeout_in_s))
        took_s = time.monotonic() - start
        # Ended at the deadline, or as soon as it was clear that it would be missed.
        done = re.fullmatch(r"CANCELLED: deadline exceeded after (\d+) of 200 steps(: .* at least .*)?", message)
        if done is not None:
            break
        assert "deadline exceeded" in message
    assert done is not None, message
    assert int(done[1]) < 200
    assert done[2] or took_s > timeout_in_s
    wait_until(lambda: counter(server, "deadline_exceeded") == before + 1, "it to be counted")

"""The client's arguments as tensors, and the answers of servers that cannot be had here."""

import inspect
import json
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from audioldm2_triton import AudioLDM2Client, contract, errors
from audioldm2_triton.contract import Limits
from audioldm2_triton.server_info import ServerInfo, read_server_info
from audioldm2_triton.transport.endpoint import parse_url
from audioldm2_triton.transport.failures import clean_message, known_failures
from audioldm2_triton.transport.sse import EventStream, refusal, request_body
from audioldm2_triton.transport.stream_reader import StreamReader
from audioldm2_triton.transport.wire import DTYPES, InferRequest, build_request

INFO = ServerInfo(Limits(), 10.24, 16000, ("DDIMScheduler", "EulerDiscreteScheduler"), "checkpoint", 8, True)
UNPUBLISHED = read_server_info({"name": "audioldm2", "max_batch_size": 8}, False)

SENT = [name for name in contract.INPUTS if name != "audio_format"]  # which is for those who have no client

DEFAULTS: dict[str, Any] = {
    "negative_prompt": None,
    "audio_length_in_s": None,
    "num_inference_steps": 20,
    "guidance_scale": 3.5,
    "num_waveforms_per_prompt": 1,
    "seed": None,
    "scheduler": None,
    "return_scores": None,
    "transcription": None,
    "window_length_in_s": 0.0,
    "priority": "interactive",
    "timeout": None,
    "request_id": "",
}


def request(prompt: Any = "rain", info: ServerInfo = INFO, **options: Any) -> InferRequest:
    return build_request(info, prompt, **{**DEFAULTS, **options})


def column(built: InferRequest, name: str) -> list[Any]:
    return [item.decode() if isinstance(item, bytes) else item for item in built.tensors[name][:, 0].tolist()]


@given(st.data())
def test_every_input_is_filled_in_with_the_contracts_shape_and_type(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 8))

    def per_row(values: st.SearchStrategy[Any]) -> Any:
        return data.draw(values | st.lists(values, min_size=rows, max_size=rows))

    prompts = data.draw(st.lists(st.text(), min_size=rows, max_size=rows))
    built = request(
        prompts,
        negative_prompt=per_row(st.none() | st.text()),
        audio_length_in_s=data.draw(st.none() | st.floats(0.1, 300)),
        num_inference_steps=per_row(st.integers(1, 200)),
        guidance_scale=per_row(st.floats(0, 50)),
        num_waveforms_per_prompt=data.draw(st.integers(1, 8)),
        seed=per_row(st.none() | st.integers(0, contract.MAX_SEED)),
        scheduler=per_row(st.none() | st.sampled_from(contract.SCHEDULERS)),
        return_scores=per_row(st.none() | st.booleans()),
        transcription=per_row(st.text()),
        window_length_in_s=per_row(st.just(0.0) | st.floats(0.64, 300)),
        priority=data.draw(st.sampled_from(contract.PRIORITIES)),
    )
    assert list(built.tensors) == SENT
    for name, tensor in built.tensors.items():
        assert tensor.shape == (rows, 1), name
        assert tensor.dtype == DTYPES[contract.INPUTS[name]], name
    assert column(built, "prompt") == prompts


def test_a_transcription_that_is_not_given_is_not_sent() -> None:
    """Most checkpoints refuse one."""
    assert list(request().tensors) == [name for name in SENT if name != "transcription"]
    assert column(request(["a", "b"], transcription=["words", None]), "transcription") == ["words", ""]
    assert column(request(["a", "b"], transcription="words"), "transcription") == ["words", "words"]


def test_defaults_are_the_servers_where_it_publishes_them() -> None:
    built = request()
    assert column(built, "audio_length_in_s") == pytest.approx([10.24])
    assert column(built, "scheduler") == ["DDIMScheduler"]
    assert column(built, "negative_prompt") == [""]
    assert column(built, "return_scores") == [False]
    assert column(request(num_waveforms_per_prompt=2), "return_scores") == [True]


def test_only_an_unknown_length_is_left_to_the_server() -> None:
    left = set(SENT) - set(request(info=UNPUBLISHED, transcription="words").tensors)
    assert left == {"audio_length_in_s"}
    assert column(request(info=UNPUBLISHED, audio_length_in_s=2.5), "audio_length_in_s") == [2.5]


def test_seeds_are_drawn_apart_and_given_seeds_stay() -> None:
    drawn = column(request(["rain"] * 8), "seed")
    assert len(set(drawn)) == 8
    # As JavaScript reads them in JSON, and without two that PyTorch takes for the same.
    assert all(0 <= seed < 2**32 and int(float(seed)) == seed for seed in drawn)
    assert column(request(["rain"] * 3, seed=contract.MAX_SEED), "seed") == [contract.MAX_SEED] * 3
    mixed = column(request(["rain"] * 3, seed=[1, None, 3]), "seed")
    assert (mixed[0], mixed[2]) == (1, 3)


def test_numpy_scalars_and_arrays_are_numbers_too() -> None:
    built = request(["a", "b"], num_inference_steps=np.array([3, 4]), guidance_scale=np.float32(2), seed=np.int64(5))
    assert column(built, "num_inference_steps") == [3, 4]
    assert column(built, "guidance_scale") == [2, 2]
    assert column(built, "seed") == [5, 5]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompt", []),
        ("prompt", ["a"] * 9),
        ("prompt", b"rain"),
        ("prompt", None),
        ("prompt", ["a", 3]),
        ("prompt", "\ud800"),
        ("negative_prompt", 3),
        ("negative_prompt", ["a", "b"]),
        ("audio_length_in_s", "10"),
        ("audio_length_in_s", [1.0]),
        ("num_inference_steps", 20.0),
        ("num_inference_steps", True),
        ("num_inference_steps", 2**31),
        ("num_inference_steps", [20, 20]),
        ("guidance_scale", "3"),
        ("guidance_scale", True),
        ("guidance_scale", None),
        ("num_waveforms_per_prompt", [1]),
        ("num_waveforms_per_prompt", 1.5),
        ("seed", 2**63),
        ("seed", "7"),
        ("scheduler", 1),
        ("return_scores", 1),
        ("window_length_in_s", None),
        ("priority", 1),
        ("priority", None),
        ("timeout", 0),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
    ],
)
def test_what_fits_no_tensor_is_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=rf"^`{argument}`: got .* but expected "):
        request(**{argument: value})


@given(st.floats(1e-9, 1e9))
def test_a_timeout_travels_in_whole_microseconds_and_never_as_none(timeout: float) -> None:
    microseconds = request(timeout=timeout).timeout_us
    assert microseconds is not None
    assert microseconds >= 1  # 0 would mean no deadline
    assert microseconds == pytest.approx(timeout * 1e6, abs=1)


def test_published_parameters_are_read_and_missing_ones_default() -> None:
    info = read_server_info(
        {
            "max_batch_size": 4,
            "parameters": {
                "max_audio_length_in_s": {"string_value": "12.5"},
                "max_num_inference_steps": {"string_value": ""},
                "schedulers": {"string_value": "DDIMScheduler, EulerDiscreteScheduler"},
            },
        },
        False,
    )
    assert info == ServerInfo(
        Limits(max_audio_length_in_s=12.5), None, None, ("DDIMScheduler", "EulerDiscreteScheduler"), None, 4, False
    )
    assert (UNPUBLISHED.limits, UNPUBLISHED.schedulers) == (Limits(), contract.SCHEDULERS)


def test_a_published_value_that_is_no_number_is_named() -> None:
    with pytest.raises(errors.InternalError, match=r"`sampling_rate`: got 'fast' but expected a number"):
        read_server_info({"parameters": {"sampling_rate": {"string_value": "fast"}}}, True)


@pytest.mark.parametrize(
    ("url", "protocol", "tls", "address"),
    [
        ("grpc://host", "grpc", False, "host:8001"),
        ("grpcs://host", "grpc", True, "host:8001"),
        ("http://host", "http", False, "host:8000"),
        ("https://host", "http", True, "host:443"),
        ("grpc://host:1/", "grpc", False, "host:1"),
        ("http://host:1/base/path/", "http", False, "host:1/base/path"),
        ("grpc://[::1]", "grpc", False, "[::1]:8001"),
    ],
)
def test_urls(url: str, protocol: str, tls: bool, address: str) -> None:
    endpoint = parse_url(url)
    assert (endpoint.protocol, endpoint.tls, endpoint.address) == (protocol, tls, address)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("[::1]", True),
        ("10.0.0.1", False),
        ("host", False),
    ],
)
def test_only_this_machine_is_reached_without_a_proxy(host: str, is_loopback: bool) -> None:
    assert (("grpc.enable_http_proxy", 0) in parse_url(f"grpc://{host}").channel_options) == is_loopback


@pytest.mark.parametrize(
    "url", ["localhost:8001", "host", "", "ftp://host", "grpc://", "grpc://host:port", "grpc://host/x", "http://a@host"]
)
def test_other_urls_are_refused_with_what_is_accepted(url: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"`url`: got .* but expected .*grpc://HOST"):
        parse_url(url)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        ("400", "`seed`: got -1", errors.InvalidArgumentError),
        ("400", "cancelled", errors.RequestCancelledError),
        ("400", "in ensemble 'audioldm2', cancelled by the client", errors.RequestCancelledError),
        ("400", "in ensemble 'audioldm2', deadline exceeded: 3 s", errors.DeadlineExceededError),
        ("StatusCode.CANCELLED", "deadline exceeded: 3 s", errors.DeadlineExceededError),
        ("StatusCode.CANCELLED", "anything else", errors.RequestCancelledError),
        ("StatusCode.DEADLINE_EXCEEDED", "Deadline Exceeded", errors.DeadlineExceededError),
        ("400", "`prompt`: got \"Stub process 'x' is not healthy\" but expected less", errors.InvalidArgumentError),
        ("400", "Request JSON size exceeds it. Use --http-max-input-size to increase", errors.InvalidArgumentError),
        ("413", "Request Entity Too Large", errors.InvalidArgumentError),
        ("429", "slow down", errors.UnavailableError),
        ("StatusCode.UNIMPLEMENTED", "no", errors.InternalError),
        ("500", "in ensemble 'a', Stub process 'decoder_0_0' is not healthy.", errors.UnavailableError),
        ("StatusCode.INTERNAL", "Stub process 'decoder_0_0' is not healthy.", errors.UnavailableError),
        ("StatusCode.INTERNAL", "Stream removed (Received RST_STREAM with error code 2)", errors.UnavailableError),
        (None, "Failed to process the request: Stub process 'x' is not healthy.", errors.UnavailableError),
        (None, "malformed", errors.InternalError),
        # As in a stream, whose errors have no status.
        (None, "INVALID_ARG: `seed`: got -1 but expected more", errors.InvalidArgumentError),
        (None, "`seed`: got -1 but expected more", errors.InternalError),
        (None, "INTERNAL: decoder failed: UNAVAILABLE: full", errors.InternalError),
        (None, "UNAVAILABLE: any words at all", errors.UnavailableError),
        (None, "[request id: 5] UNAVAILABLE: denoiser is full", errors.UnavailableError),
        (None, "Request for unknown model: 'audioldm2_stream' is not found", errors.UnavailableError),
        (None, "CANCELLED: cancelled after 3 of 20 steps", errors.RequestCancelledError),
        (None, "CANCELLED: deadline exceeded after 3 of 20 steps", errors.DeadlineExceededError),
    ],
)
def test_statuses_and_messages_tell_the_kind(
    status: str | None, message: str, kind: type[errors.AudioLDM2Error]
) -> None:
    with pytest.raises(errors.AudioLDM2Error) as caught, known_failures(parse_url("grpc://host"), None):
        raise InferenceServerException(message, status)
    assert type(caught.value) is kind


def test_a_gateways_page_becomes_one_line() -> None:
    page = InferenceServerException("... <html>\nBad Gateway", "502", "<html>\nBad Gateway")
    with pytest.raises(errors.UnavailableError) as caught, known_failures(parse_url("http://host"), None):
        raise page
    assert str(caught.value) == "http://host: got HTTP status 502 without a message from Triton"


def test_other_exceptions_pass_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), known_failures(parse_url("grpc://host"), None):
        raise ZeroDivisionError


@pytest.mark.parametrize("own", ["`seed`: got -1 but expected more", "denoiser failed: in ensemble 'x', y", ""])
@pytest.mark.parametrize(
    "noise",
    ["", "in ensemble 'audioldm2', ", "in ensemble 'audioldm2', [request id: <id_unknown>] ", "[request id: 1] "],
)
def test_only_tritons_words_around_a_message_are_removed(noise: str, own: str) -> None:
    assert clean_message(noise + own) == own


def test_a_request_as_json_loses_nothing() -> None:
    options = {"guidance_scale": 2.3, "audio_length_in_s": 1.93, "seed": contract.MAX_SEED, "return_scores": True}
    built = request("噪音\n", negative_prompt='"', transcription="é'", timeout=0.25, request_id="a-b", **options)
    body = json.loads(request_body(built))
    assert (body.pop("timeout"), body.pop("id")) == (250000, "a-b")
    assert set(body) == set(SENT)
    for name, tensor in built.tensors.items():
        value = body[name].encode() if contract.INPUTS[name] == "BYTES" else body[name]
        assert np.array([[value]], DTYPES[contract.INPUTS[name]]) == tensor, name


def test_numbers_that_json_has_not_are_refused() -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"^`guidance_scale`: got inf but expected a finite number"):
        request_body(request(guidance_scale=1e39))


@given(st.lists(st.integers(1, 60)))
def test_an_event_stream_is_the_same_in_whatever_pieces_it_arrives(lengths: list[int]) -> None:
    body = 'data: {"step":1,"prompt":"噪音"}\n\n: a comment\r\n\r\ndata: {"audio":[0.5,-1.0]}\r\n\r\n'.encode()
    stream, tensors = EventStream(), []
    for length in [*lengths, len(body)]:
        tensors += stream.feed(body[:length])
        body = body[length:]
    assert [{name: value.tolist() for name, value in item.items()} for item in tensors] == [
        {"step": 1, "prompt": "噪音"},
        {"audio": [0.5, -1.0]},
    ]


def test_an_event_that_is_no_json_is_internal() -> None:
    with pytest.raises(errors.InternalError, match="not JSON"):
        list(EventStream().feed(b"data: <html>\n"))


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, b'data: {"error":"INVALID_ARG: `seed`: got -1"}\n\n', errors.InvalidArgumentError, "`seed`: got -1"),
        (404, b'{"error":"unknown"}', errors.UnavailableError, "http://host: unknown"),
        (502, b"<html>", errors.UnavailableError, "http://host: got HTTP status 502 without a message from Triton"),
    ],
)
def test_a_stream_refused_over_http(status: int, body: bytes, kind: type[Exception], message: str) -> None:
    with pytest.raises(errors.AudioLDM2Error) as caught, known_failures(parse_url("http://host"), None):
        raise refusal(status, body)
    assert (type(caught.value), str(caught.value)) == (kind, message)


def chunk(index: int, count: int, samples: int = 2) -> dict[str, Any]:
    counts = {"chunk": np.array(index), "num_chunks": np.array(count)}
    return {"audio": np.zeros(2 * samples), "sampling_rate": np.array(9), **counts}


LAST = {
    "score": np.array([0.9, 0.1]),
    "order": np.array([1, 0]),
    "seed_used": np.array(7),
    "sampling_rate": np.array(9),
}


@pytest.mark.parametrize(
    ("responses", "complaint"),
    [
        ([chunk(1, 2)], "chunk 1 of 2 arrived as number 0"),
        ([chunk(0, 2), LAST], "there are only 1 chunks of audio"),
        ([LAST], "there are only 0 chunks of audio"),
        ([chunk(0, 1), {**LAST, "order": np.array([1, 1])}], r"`order` is \[1, 1\] for 2 waveforms"),
        ([chunk(0, 1), {name: LAST[name] for name in ("score", "order")}], "seed_used"),
        ([{"step": np.array(1)}], "num_steps"),
        ([{**chunk(0, 1), "audio": np.zeros(3)}], "reshape"),
    ],
)
def test_a_stream_that_is_not_whole_is_internal(responses: list[dict[str, Any]], complaint: str) -> None:
    reader = StreamReader(request(num_waveforms_per_prompt=2))
    with pytest.raises(errors.InternalError, match=f"incomplete response: .*{complaint}"):
        deque(map(reader.read, responses))


def test_the_requests_defaults_are_those_of_generate() -> None:
    assert {
        name: parameter.default
        for name, parameter in inspect.signature(AudioLDM2Client.generate).parameters.items()
        if name in DEFAULTS
    } == DEFAULTS
    for name, parameter in inspect.signature(build_request).parameters.items():
        assert parameter.default == DEFAULTS.get(name, inspect.Parameter.empty), name

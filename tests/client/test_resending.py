"""A request that is refused or lost for a while is sent again: the same request, within its timeout."""

import itertools

import pytest

from audioldm2_triton import AudioLDM2Client, UnavailableError
from audioldm2_triton.errors import InternalError, InvalidArgumentError
from audioldm2_triton.transport.resending import LONGEST_DELAY_IN_S, Resending
from contract_stand_in.both_clients import open_client
from contract_stand_in.stand_in_server import StandInServer

FULL = UnavailableError("denoiser is full")
KEYS = itertools.count()


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("protocol", [0, 1], ids=["grpc", "http"])
def test_it_is_sent_as_often_as_allowed(kind: str, protocol: int, server: StandInServer) -> None:
    with open_client(kind, server.urls[protocol], max_retries=2) as client:
        result = client.generate(f"!busy {next(KEYS)} 2 full; retry after 0.1 s")
        same = client.generate("rain", seed=result.seed)
        assert result.audio.shape == same.audio.shape
        with pytest.raises(UnavailableError, match="full"):
            client.generate(f"!busy {next(KEYS)} 3 full")
        # A stream belongs to whoever reads it.
        with pytest.raises(UnavailableError, match="full"):
            client.stream(f"!busy {next(KEYS)} 1 full")
    with open_client(kind, server.urls[protocol], max_retries=0) as client, pytest.raises(UnavailableError):
        client.generate(f"!busy {next(KEYS)} 1 full")


def test_other_errors_are_final(server: StandInServer) -> None:
    with AudioLDM2Client(server.urls[0], max_retries=5) as client:
        with pytest.raises(InternalError):
            client.generate("!fail INTERNAL decoder failed")
        with pytest.raises(InvalidArgumentError):
            client.generate("!fail INVALID_ARG `seed`: got -1")


def test_delays_double_to_a_bound_and_attempts_end() -> None:
    resending = Resending(7, None)
    delays = [resending.delay(FULL) for _ in range(7)]
    for attempt, delay in enumerate(delays):
        longest = min(0.5 * 2**attempt, LONGEST_DELAY_IN_S)
        assert longest / 2 <= delay <= longest
    with pytest.raises(UnavailableError):
        resending.delay(FULL)


def test_no_attempt_begins_after_the_timeout() -> None:
    resending = Resending(7, 0.01)
    assert resending.timeout() == 0.01
    with pytest.raises(UnavailableError, match="full"):
        resending.delay(FULL)


def test_a_server_that_names_a_time_is_waited_for() -> None:
    error = UnavailableError("denoiser is full; retry after 20.5 s")
    assert Resending(1, None).delay(error) == 20.5
    with pytest.raises(UnavailableError):
        Resending(1, 20.0).delay(error)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_a_wrong_number_of_retries_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match="max_retries"):
        AudioLDM2Client(max_retries=value)  # type: ignore[arg-type]

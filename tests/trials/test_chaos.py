"""The verdicts of `scripts/chaos`, and a short run; `commands/test_supervision.py` has each fault alone."""

from pathlib import Path
from random import Random
from signal import SIGKILL, SIGSTOP

import pytest

from serving.local_server import local_server
from trials.chaos import Resent, Round, chaos, success_rates
from trials.requests import known_requests
from trials.watching import left_behind


def test_what_takes_too_long_or_hangs_is_named() -> None:
    assert Round("decoder", SIGKILL, wrong=2).failures() == ["SIGKILL of decoder: the audio of 2 answers was wrong"]
    assert Round("decoder", SIGKILL, calls_ended_in_s=4.9, served_in_s=19.9).failures() == []
    assert Round("decoder", SIGSTOP, calls_ended_in_s=14.9, served_in_s=29.9).failures() == []
    assert Round("decoder", SIGKILL, calls_ended_in_s=5.1, hung=1, served_in_s=20.1).failures() == [
        "SIGKILL of decoder: 1 calls hung",
        "SIGKILL of decoder: the last call ended after 5.1 s",
        "SIGKILL of decoder: the next right answer came after 20.1 s",
    ]


def test_success_is_counted_near_a_fault_and_elsewhere() -> None:
    resent = Resent(ended=[(5.0, True), (11.0, False), (29.0, True), (31.0, True), (100.0, False)])
    assert success_rates(resent, [10.0, 90.0]) == {True: (1, 3), False: (2, 2)}


@pytest.mark.slow
def test_a_minute_of_chaos(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with local_server(tiny_checkpoint, tmp_path / "log", "--max-restart-delay-in-s=0") as server:
        rounds, resent, struck = chaos(server, known_requests(server), 1.0, 2, Random(1))
        assert not left_behind(server)
    assert len(rounds) == len(struck) >= 2
    assert {each.signal for each in rounds} == {SIGKILL, SIGSTOP}
    assert not any(each.hung or each.wrong for each in rounds)
    assert not resent.wrong
    assert all(right for _, right in resent.ended)

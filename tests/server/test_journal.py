"""The journal of a request: what one stage writes the next one reads, whoever wrote it."""

import time

import numpy as np
import pytest

from audioldm2_triton.server.journal import WIDTH, Journal, read_journal


def test_what_is_written_is_read() -> None:
    written = Journal(1, 2, 3, 4, prompts=2, waveforms=6, steps=20, audio_ms=2560)
    tensor = written.tensor(2)
    assert tensor.shape == (2, WIDTH)
    assert tensor.dtype == np.int64
    assert read_journal(tensor, arrived_ns=5) == written


def test_the_parts_of_the_duration() -> None:
    second = 1_000_000_000
    whole = Journal(second, 2 * second, 4 * second, 8 * second)
    seconds = {part: (end - begin) / second for part, (begin, end) in whole.parts(16 * second).items()}
    assert seconds == {"text": 1, "queue": 2, "denoising": 4, "decoding": 8}


def test_what_fails_was_in_its_last_part() -> None:
    assert Journal(1, 2).parts(16) == {"text": (1, 2), "queue": (2, 16)}
    assert Journal(1, 2, 4).parts(16) == {"text": (1, 2), "queue": (2, 4), "denoising": (4, 16)}
    assert Journal(1).parts(16) == {}


def test_no_part_takes_less_than_no_time() -> None:
    assert Journal(10, 9, 8, 7).parts(6) == {"text": (10, 10), "queue": (9, 9), "denoising": (8, 8), "decoding": (7, 7)}


@pytest.mark.parametrize("tensor", [None, np.zeros((1, WIDTH - 1), np.int64), np.zeros((0, WIDTH), np.int64)])
def test_without_a_journal_the_request_arrives_here(tensor: np.ndarray | None) -> None:
    assert read_journal(tensor, arrived_ns=5) == Journal(5)


@pytest.mark.parametrize("number", [-1, 2**63 - 1, -(2**63)])
def test_moments_that_cannot_be_are_none(number: int) -> None:
    """A stage can be called by itself, with any numbers."""
    now = time.monotonic_ns()
    read = read_journal(np.full((1, WIDTH), number, np.int64), now)
    assert (read.arrived_ns, read.conditioned_ns, read.admitted_ns, read.denoised_ns) == (now, 0, 0, 0)
    assert min(read.prompts, read.waveforms, read.steps, read.audio_ms) >= 0

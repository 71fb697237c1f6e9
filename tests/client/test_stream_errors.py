"""The errors of a stream, whose messages are all that Triton sends of them."""

import pytest

from audioldm2_triton.errors import (
    AudioLDM2Error,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    read_message,
    stream_message,
)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (
            "incomplete string data for inference input 'prompt', expecting string of length 14113264 but only 6 bytes "
            "available",
            InvalidArgumentError,
        ),
        ("[request id: 1] unexpected shape for input 'prompt' for model 'audioldm2_stream'", InvalidArgumentError),
        ("unexpected inference input 'loudness' for model 'audioldm2_stream'", InvalidArgumentError),
        ("Request for unknown model: 'audioldm2_stream' is not found", UnavailableError),
        ("Failed to process the request(s) for model 'decoder', message: no input", InternalError),
    ],
)
def test_triton_s_own_words_have_a_kind(message: str, kind: type[AudioLDM2Error]) -> None:
    assert type(read_message(message)) is kind


@pytest.mark.parametrize("kind", [InvalidArgumentError, UnavailableError, InternalError])
def test_a_stage_s_words_carry_theirs(kind: type[AudioLDM2Error]) -> None:
    read = read_message(stream_message(kind("denoiser: input 'prompt'")))
    assert (type(read), str(read)) == (kind, "denoiser: input 'prompt'")

"""The vocoder in chunks gives what it gives for the whole, and a chunk is the same in whatever company it comes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import SpeechT5HifiGan

from decoding_parts import decode_parts
from random_vocoder import CONFIGS, random_vocoder
from vocoder_chunks import VocoderReach, plan_chunks, vocoder_reach
from waveform_decoder import WaveformDecoder, decode_mels, decode_waveforms, load_waveform_decoder, vocode

CPU = torch.device("cpu")


# Of AudioLDM 2 and of others: upsamplers that add samples and those that do not, few and many, with normalisation.
@torch.inference_mode()
def joined(vocoder: SpeechT5HifiGan, reach: VocoderReach, mel: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [
            vocoder(mel[chunk.first_frame : chunk.end_frame])[chunk.first_sample : chunk.end_sample]
            for chunk in plan_chunks(reach, len(mel), chunk_frames=32)
        ]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_joined_chunks_are_the_whole(name: str) -> None:
    vocoder = random_vocoder(name)
    reach = vocoder_reach(vocoder)
    for frames in (2, 77, 78, 79, 110, 143, 200):
        mel = torch.randn(frames, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            whole = vocoder(mel)
        torch.testing.assert_close(joined(vocoder, reach, mel), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_overlap_is_as_short_as_it_can_be(name: str) -> None:
    vocoder = random_vocoder(name)
    reach = vocoder_reach(vocoder)
    with torch.no_grad():
        vocoder.mean.zero_()
        for parameter_name, parameter in vocoder.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
    # Silence but for one frame: however faint it is at the end of its reach, it is not lost in what is added to it.
    mel = torch.zeros(101, 8, dtype=torch.float64)
    mel[50] = 1
    with torch.inference_mode():
        heard = vocoder(mel).nonzero()[:, 0] // reach.samples_per_frame
    assert max(50 - int(heard.min()), int(heard.max()) - 50) == reach.overlap_frames


@given(
    num_frames=st.integers(1, 3000),
    chunk_frames=st.integers(1, 300),
    overlap=st.integers(0, 60),
    per_frame=st.integers(1, 5),
    extra=st.integers(0, 4),
)
def test_plans(num_frames: int, chunk_frames: int, overlap: int, per_frame: int, extra: int) -> None:
    reach = VocoderReach(per_frame, extra, overlap)
    chunks = plan_chunks(reach, num_frames, chunk_frames)
    assert len({chunk.end_frame - chunk.first_frame for chunk in chunks}) == 1
    assert chunks[0].end_frame <= chunk_frames + 2 * overlap
    position = 0
    for chunk in chunks:
        assert 0 <= chunk.first_frame < chunk.end_frame <= num_frames
        assert chunk.num_samples > 0
        assert chunk.first_frame * per_frame + chunk.first_sample == position
        position += chunk.num_samples
        # Either the clip begins or ends there, or there is the overlap.
        assert chunk.first_frame == 0 or chunk.first_sample >= overlap * per_frame
        after = (chunk.end_frame - chunk.first_frame) * per_frame - chunk.end_sample
        assert chunk.end_frame == num_frames or after >= overlap * per_frame
    assert position == reach.num_samples(num_frames)


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Path) -> WaveformDecoder:
    return load_waveform_decoder(tiny_checkpoint, CPU, torch.float32)


def latents(frames: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, frames, 16, generator=torch.Generator().manual_seed(frames))


def test_the_decoder_gives_what_the_vocoder_gives_for_the_whole(decoder: WaveformDecoder) -> None:
    for frames in (5, 76, 180):
        assert len(plan_chunks(decoder.reach, 4 * frames)) == {5: 1, 76: 2, 180: 3}[frames]
        waveforms = decode_waveforms(decoder, list(latents(frames, 2)))
        mels = torch.stack(decode_mels(decoder, list(latents(frames, 2))))
        with torch.inference_mode():
            whole = decoder.vocoder(mels)
        torch.testing.assert_close(torch.stack(waveforms), whole, rtol=0, atol=2e-6)


def test_a_window_gives_the_same_bits_in_any_company(decoder: WaveformDecoder) -> None:
    windows = [torch.randn(frames, 64) for frames in (300, 300, 40, 300, 41, 40)]
    together = vocode(decoder, windows)
    for window, waveform in zip(windows, together, strict=True):
        np.testing.assert_array_equal(vocode(decoder, [window])[0], waveform)


@pytest.mark.parametrize(("frames", "missing"), [(3, 0), (77, 100), (200, -128)])
def test_the_parts_make_the_whole(frames: int, missing: int, decoder: WaveformDecoder) -> None:
    """`missing` samples are made up with silence at the end, so that the length is what was promised."""
    made = decoder.reach.num_samples(4 * frames)
    inputs = {
        "latents": latents(frames, 3)[None].numpy(),
        "num_samples": np.array([[made + missing]], np.int32),
        "return_scores": np.array([[False]]),
        "text_embeds": np.ones((1, 16), np.float32),
    }
    scorer = None  # not asked
    [whole] = decode_parts(decoder, scorer, "", [inputs])  # type: ignore[arg-type]
    [cut] = decode_parts(decoder, scorer, "mel", [inputs])  # type: ignore[arg-type]
    requests = [
        {"mel_window": cut["mel_windows"][:, index], "kept_samples": cut["kept_samples"][:, index]}
        for index in range(cut["mel_windows"].shape[1])
    ]
    assert len(requests) == len(plan_chunks(decoder.reach, 4 * frames))
    parts = decode_parts(decoder, scorer, "vocode", requests)  # type: ignore[arg-type]
    audio = np.concatenate([part["audio"] for part in parts], axis=2)
    assert audio.shape == (1, 3, made + missing)
    np.testing.assert_array_equal(audio, whole["audio"])
    assert np.abs(audio[:, :, :1000]).max() > 0.01

"""Requests of low priority let others in before each forward, and get the same bits as without them."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import waveform_decoder
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.residency import Residency
from audioldm2_triton.server.stage_tensors import WHOLE
from chunked_vae import decode_chunked
from clap_scores import ClapScorer, load_clap_scorer
from decoder_buckets import Buckets
from decoder_compilation import compile_decoder
from decoder_stage import MAX_LATENT_FRAMES_THAT_GIVE_WAY, giving_way
from decoding_parts import Tensors, decode_parts
from vocoder_chunks import CHUNK_FRAMES
from waveform_decoder import WaveformDecoder, load_waveform_decoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> tuple[WaveformDecoder, ClapScorer]:
    loaded = load_waveform_decoder(tiny_checkpoint, CPU, torch.float32)
    return loaded, load_clap_scorer(tiny_checkpoint, CPU, torch.float32)


def request(scorer: ClapScorer, seed: int, frames: int, waveforms: int = 1) -> Tensors:
    generator = np.random.default_rng(seed)
    return {
        "latents": generator.standard_normal((1, waveforms, 8, frames, 16)).astype(np.float32),
        "num_samples": np.array([[frames * 640]], np.int32),
        "return_scores": np.array([[True]]),
        "text_embeds": generator.standard_normal((1, scorer.text_dim)).astype(np.float32),
    }


def test_others_are_let_in_before_each_forward(parts: tuple[WaveformDecoder, ClapScorer]) -> None:
    decoder, scorer = parts
    calls: list[None] = []
    patient = giving_way(decoder, scorer, lambda: calls.append(None), lambda: None)
    frames = MAX_LATENT_FRAMES_THAT_GIVE_WAY // 2
    decode_parts(*patient, WHOLE, [request(scorer, seed, frames) for seed in range(3)])
    windows = len(decoder.plan_chunks(4 * frames))
    # Two and one through the VAE, each window through the vocoder; each waveform to CLAP's features, and through CLAP.
    assert len(calls) == 2 + 3 * windows + 2 * 3


def test_nobody_is_let_in_while_another_stage_waits_for_the_device(parts: tuple[WaveformDecoder, ClapScorer]) -> None:
    decoder, scorer = parts
    calls: list[str] = []
    residency = mock.Mock(Residency, is_wanted=True)
    patient, _ = giving_way(
        *(replace(decoder, residency=residency), scorer),
        *(lambda: calls.append("give way"), lambda: calls.append("keep on")),
    )
    patient.before_forward()
    residency.is_wanted = False
    patient.before_forward()
    assert calls == ["keep on", "give way"]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_those_let_in_change_no_bit(
    parts: tuple[WaveformDecoder, ClapScorer], tiny_checkpoint: Path, is_compiled: bool
) -> None:
    decoder, scorer = parts
    if is_compiled:
        window = CHUNK_FRAMES + 2 * decoder.reach.overlap_frames
        buckets = Buckets((1, 2), (32,), 64), Buckets((1, 2), (window,), 2 * window)
        decoder = compile_decoder(decoder, read_audio_geometry(tiny_checkpoint), *buckets, backend="eager")
        assert decoder.compiled is not None
    other = request(scorer, 9, 24, waveforms=2)
    # Four of 32 frames are one call of the VAE, however they are decoded.
    own = [request(scorer, seed, 32) for seed in range(4)]
    alone, others_alone = decode_parts(decoder, scorer, WHOLE, own), decode_parts(decoder, scorer, WHOLE, [other])[0]
    let_in: list[dict[str, np.ndarray]] = []
    patient = giving_way(
        *(decoder, scorer, lambda: let_in.extend(decode_parts(decoder, scorer, WHOLE, [other]))), lambda: None
    )
    for result, expected in zip(decode_parts(*patient, WHOLE, own), alone, strict=True):
        assert all(np.array_equal(result[name], expected[name]) for name in expected)
    assert let_in
    assert all(np.array_equal(each[name], others_alone[name]) for each in let_in for name in others_alone)


def test_a_clip_that_is_decoded_in_chunks_lets_others_in_between_them(
    parts: tuple[WaveformDecoder, ClapScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, _ = parts
    latents = torch.randn(1, 8, 40, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone = decode_chunked(decoder.vae, latents, chunk_frames=8)
        calls: list[None] = []

        def let_in() -> None:
            calls.append(None)
            decoder.vae.decode(latents[:, :, :4])

        assert torch.equal(decode_chunked(decoder.vae, latents, chunk_frames=8, between_chunks=let_in), alone)
    assert len(calls) > 5 * 10  # five chunks through each of many layers
    # And so does the decoder.
    calls.clear()
    monkeypatch.setattr(waveform_decoder, "MAX_WHOLE_FRAMES", 16)
    patient = replace(decoder, before_forward=lambda: calls.append(None))
    waveform_decoder.decode_mels(patient, [latents[0]])
    assert len(calls) > 10

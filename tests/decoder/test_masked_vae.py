"""The decoder in buckets: padded VAE and vocoder give each row what it gives alone, compiled or not."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from audioldm2_triton.server.geometry import AudioGeometry, read_audio_geometry
from audioldm2_triton.server.settings import Settings
from channels_last import use_channels_last
from decoder_buckets import Buckets, map_in_buckets
from decoder_compilation import compile_decoder, compile_for_settings
from decoding_parts import decode_parts
from masked_vae import decode_masked
from masked_vocoder import vocode_masked
from random_vocoder import CONFIGS, random_vocoder
from vae_walk import check_followed
from vocoder_chunks import plan_chunks, vocoder_reach
from waveform_decoder import WaveformDecoder, decode_mels, decode_waveforms, load_waveform_decoder

CPU = torch.device("cpu")
TOLERANCE = 1e-5
WINDOW_FRAMES = 302


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Path) -> WaveformDecoder:
    return load_waveform_decoder(tiny_checkpoint, CPU, torch.float32)


@pytest.fixture(scope="module")
def geometry(tiny_checkpoint: Path) -> AudioGeometry:
    return read_audio_geometry(tiny_checkpoint)


def latents(frames: int) -> torch.Tensor:
    return torch.randn(8, frames, 16, generator=torch.Generator().manual_seed(frames))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.shape == expected.shape
    return float((value - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_the_vae_are_as_alone(seed: int, decoder: WaveformDecoder) -> None:
    lengths = [64, *random.Random(seed).sample(range(1, 65), 4)]
    # What is behind a row's end is loud: it must not matter.
    batch = 30 * torch.randn(len(lengths), 8, 64, 16, generator=torch.Generator().manual_seed(seed))
    mels = decode_masked(decoder.vae, batch, torch.tensor(lengths))
    for row, frames in enumerate(lengths):
        alone = decoder.vae.decode(batch[row : row + 1, :, :frames]).sample
        assert relative(mels[row : row + 1, :, : 4 * frames], alone) < TOLERANCE, frames


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_the_vocoder_are_as_alone(name: str) -> None:
    vocoder = random_vocoder(name)
    reach = vocoder_reach(vocoder)
    lengths = [100, 37, 9, 2]
    batch = 3 * torch.randn(4, 100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    waveforms = vocode_masked(vocoder, batch, torch.tensor(lengths))
    for row, frames in enumerate(lengths):
        alone = vocoder(batch[row : row + 1, :frames])
        assert relative(waveforms[row : row + 1, : reach.num_samples(frames)], alone) < 1e-12, frames


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_for_a_gpu_changes_no_audio(name: str, tiny_checkpoint: Path) -> None:
    decoder = load_waveform_decoder(tiny_checkpoint, CPU, torch.float64)
    latent, valid = latents(40)[None].double(), torch.tensor([40])
    vocoder, mel = random_vocoder(name), 3 * torch.randn(2, 50, 8, dtype=torch.float64)
    expected = decode_masked(decoder.vae, latent, valid), vocoder(mel)
    use_channels_last(decoder.vae, vocoder)
    inputs: list[torch.Tensor] = []
    for module in vocoder.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    frames = torch.tensor([50, 50])
    for got, wanted in zip(
        (decode_masked(decoder.vae, latent, valid), vocoder(mel), vocode_masked(vocoder, mel, frames)),
        (*expected, expected[1]),
        strict=True,
    ):
        assert relative(got, wanted) < 1e-12
    # The channels lie side by side before every convolution: none has to lay out its input anew.
    assert len(inputs) > 10
    assert {tensor.stride(1) for tensor in inputs} == {1}


@pytest.mark.parametrize(
    ("option", "value"),
    [("act_fn", "gelu"), ("mid_block_add_attention", False), ("up_block_types", ["AttnUpDecoderBlock2D"])],
)
def test_a_vae_that_is_not_followed_is_refused(option: str, value: object) -> None:
    vae = AutoencoderKL(block_out_channels=(32,), **{option: value})
    with pytest.raises(ValueError, match=f"{option} of the VAE: got .* but expected"):
        check_followed(vae)


def test_buckets() -> None:
    buckets = Buckets((1, 2, 4), (8, 20), max_frames_per_call=33)
    assert buckets.shapes == [(1, 8), (2, 8), (4, 8), (1, 20)]
    seen = []

    def double(batch: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(batch.shape), valid.tolist()))
        return 2 * batch

    items = [torch.randn(3, frames, 2) for frames in (8, 9, 1, 20, 7, 5, 4, 3, 2)]
    results = map_in_buckets(double, items, buckets, CPU, torch.float32)
    for item, result in zip(items, results, strict=True):
        frames = item.shape[1]
        torch.testing.assert_close(result[:, :frames], 2 * item)
        assert not result[:, frames:].any()
    assert seen == [
        ((4, 3, 8, 2), [8, 1, 7, 5]),
        ((4, 3, 8, 2), [4, 3, 2, 1]),
        ((1, 3, 20, 2), [9]),
        ((1, 3, 20, 2), [20]),
    ]


@pytest.mark.parametrize(("rows", "frames"), [((2, 4), (8,)), ((1, 1), (8,)), ((1,), ()), ((1,), (8, 4)), ((1,), (0,))])
def test_buckets_are_refused(rows: tuple[int, ...], frames: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="but expected"):
        Buckets(rows, frames, 100)


def check_compiled(compiled: WaveformDecoder, eager: WaveformDecoder) -> None:
    """The audio of the uncompiled decoder, for lengths below, at and above the buckets, in one call and in parts."""
    items = [latents(frames) for frames in (64, 3, 37, 64, 100, 20, 1)]
    with torch.compiler.set_stance("fail_on_recompile"):
        mels = decode_mels(compiled, items)
        waveforms = decode_waveforms(compiled, items)
    for mel, expected in zip(mels, decode_mels(eager, items), strict=True):
        assert relative(mel, expected) < TOLERANCE
    for waveform, expected in zip(waveforms, decode_waveforms(eager, items), strict=True):
        assert relative(waveform, expected) < 1e-4  # the VAE's last bits through the vocoder


def check_parts(decoder: WaveformDecoder, frames: int) -> None:
    inputs = {
        "latents": torch.stack([latents(frames), latents(frames).flip(0)])[None].numpy(),
        "num_samples": np.array([[decoder.reach.num_samples(4 * frames)]], np.int32),
        "return_scores": np.array([[False]]),
        "text_embeds": np.ones((1, 16), np.float32),
    }
    scorer: Any = None  # not asked
    [whole] = decode_parts(decoder, scorer, "", [inputs])
    [cut] = decode_parts(decoder, scorer, "mel", [inputs])
    parts = []
    for index in range(cut["mel_windows"].shape[1]):
        request = {"mel_window": cut["mel_windows"][:, index], "kept_samples": cut["kept_samples"][:, index]}
        parts += decode_parts(decoder, scorer, "vocode", [request])
    assert len(parts) == len(plan_chunks(decoder.reach, 4 * frames))
    np.testing.assert_array_equal(np.concatenate([part["audio"] for part in parts], axis=2), whole["audio"])


@pytest.mark.parametrize(("rows", "frames"), [((1,), (20, 64)), ((1, 2), (64,))], ids=["cpu", "gpu"])
def test_buckets_give_the_audio_of_the_uncompiled_decoder(
    rows: tuple[int, ...],
    frames: tuple[int, ...],
    decoder: WaveformDecoder,
    geometry: AudioGeometry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the graphs of the compiler, executed as they are: everything but the generated code."""
    caplog.set_level(logging.INFO)
    windows = Buckets(rows, (WINDOW_FRAMES,), 4 * WINDOW_FRAMES)
    compiled = compile_decoder(decoder, geometry, Buckets(rows, frames, 256), windows, backend="eager")
    assert compiled.compiled is not None
    progress = [record.getMessage() for record in caplog.records]
    assert len(progress) == len(rows) * (len(frames) + 1)
    assert progress[0].startswith(f"decoder: compiled 1 of 2: VAE, latents of 1 x {frames[0]} frames, in ")
    check_compiled(compiled, decoder)
    if rows == (1,):  # as on a CPU
        for length in (3, 64, 100, 200):
            check_parts(compiled, length)


def test_nothing_is_compiled_for_a_request(decoder: WaveformDecoder, geometry: AudioGeometry) -> None:
    compilations = 0

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return graph.forward

    small = Buckets((1,), (8,), 64)
    compiled = compile_decoder(decoder, geometry, small, Buckets((1,), (WINDOW_FRAMES,), 4 * WINDOW_FRAMES), backend)
    assert compiled.compiled is not None
    assert compilations == 2
    # Not even where a bucket was forgotten.
    parts = replace(compiled.compiled, vae=replace(compiled.compiled.vae, buckets=Buckets((1,), (8, 16), 64)))
    for frames in (8, 5, 12, 16, 40):
        result = decode_waveforms(replace(compiled, compiled=parts), [latents(frames)])[0]
        assert relative(result, decode_waveforms(decoder, [latents(frames)])[0]) < 1e-4
    assert compilations == 2


def test_a_compiler_that_fails_leaves_the_decoder_as_it_was(
    decoder: WaveformDecoder, geometry: AudioGeometry, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(*_: Any) -> Callable[..., Any]:
        raise OSError("no compiler")

    small = Buckets((1,), (8,), 64)
    assert compile_decoder(decoder, geometry, small, small, backend) is decoder
    assert "decoder: compiling failed, going on without" in caplog.text


@pytest.mark.slow
def test_compiled_code_gives_the_audio_of_the_uncompiled_decoder(
    decoder: WaveformDecoder, geometry: AudioGeometry, tiny_checkpoint: Path
) -> None:
    settings = Settings(str(tiny_checkpoint), compile="on", compile_lengths_in_s="2.56")
    compiled = compile_for_settings(decoder, settings, geometry)
    assert compiled.compiled is not None
    assert compiled.compiled.vae.buckets.shapes == [(1, 64)]
    assert compiled.compiled.vocoder.buckets.shapes == [(1, WINDOW_FRAMES)]
    check_compiled(compiled, decoder)
    for frames in (3, 64, 100, 200):
        check_parts(compiled, frames)

"""Decodes latents to waveforms: the VAE's decoder, then the vocoder chunk by chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import SpeechT5HifiGan

from audioldm2_triton.errors import NonFiniteError
from audioldm2_triton.server import faults
from audioldm2_triton.server.linear import replace_linear_layers
from audioldm2_triton.server.residency import Residency
from channels_last import use_channels_last
from chunked_vae import decode_chunked
from decoder_buckets import Buckets, map_in_buckets
from vae_walk import check_followed
from vocoder_chunks import VocoderChunk, VocoderReach, plan_chunks, vocoder_reach

MAX_LATENT_FRAMES_PER_CALL: Final = 2048
"""Latent frames that the VAE decodes together, 80 s of audio: bounds the memory, whatever the number of requests."""

MAX_WHOLE_FRAMES: Final = 1024
"""Latent frames of the longest clip that the VAE decodes whole, 41 s of audio; longer ones go through it in chunks."""

MAX_MEL_FRAMES_PER_CALL: Final = 8192
"""The same for the vocoder on a GPU."""


@dataclass(frozen=True)
class CompiledPart:
    """A compiled forward that has run once in each of its shapes."""

    function: Callable[[Tensor, Tensor], Tensor]  # takes a padded batch and its rows' valid frames
    buckets: Buckets

    def __call__(self, batch: Tensor, valid_frames: Tensor) -> Tensor:
        # Nothing is compiled while a request waits: should no graph fit after all, this runs uncompiled.
        with torch.compiler.set_stance("eager_on_recompile"):
            return self.function(batch, valid_frames)


@dataclass(frozen=True)
class CompiledParts:
    vae: CompiledPart  # latents [rows, C, frames, W] to spectrograms [rows, 1, T, M]
    vocoder: CompiledPart  # spectrograms [rows, frames, M] to waveforms [rows, S]


@dataclass(frozen=True)
class WaveformDecoder:
    """The decoding parts of a checkpoint, in evaluation mode on one device."""

    vae: Any  # AutoencoderKL without its encoder
    vocoder: SpeechT5HifiGan
    reach: VocoderReach
    device: torch.device
    dtype: torch.dtype
    compiled: CompiledParts | None = None  # runs instead for whatever fits its buckets
    residency: Residency = field(default_factory=Residency)  # of all the stage's weights, including CLAP's
    max_latent_frames_per_call: int = MAX_LATENT_FRAMES_PER_CALL
    before_forward: Callable[[], None] = lambda: None

    @property
    def sampling_rate(self) -> int:
        return self.vocoder.config.sampling_rate

    def plan_chunks(self, num_frames: int) -> tuple[VocoderChunk, ...]:
        """Plans the vocoder's chunks for a clip of so many mel frames."""
        return plan_chunks(self.reach, num_frames, full_windows=self.compiled is not None)


def load_waveform_decoder(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> WaveformDecoder:
    """Raises ValueError for a VAE with options that `check_followed` does not accept."""
    vae = AutoencoderKL.from_pretrained(str(checkpoint / "vae"), torch_dtype=dtype, local_files_only=True)
    check_followed(vae)
    del vae.encoder, vae.quant_conv
    replace_linear_layers(vae)
    vocoder: Any = SpeechT5HifiGan.from_pretrained(str(checkpoint / "vocoder"), dtype=dtype, local_files_only=True)
    reach = vocoder_reach(vocoder)
    if device.type == "cuda":
        use_channels_last(vae, vocoder)
    return WaveformDecoder(vae.to(device).eval(), vocoder.to(device).eval(), reach, device, dtype)


def decode_waveforms(decoder: WaveformDecoder, latents: Sequence[Tensor]) -> list[Tensor]:
    """Decodes M latents [C, H, W] of any lengths.

    Returns M waveforms, float32 on the host, each as long as the vocoder makes it. Raises `NonFiniteError` for
    non-finite values.
    """
    mels = decode_mels(decoder, latents)
    plans = [decoder.plan_chunks(len(mel)) for mel in mels]
    windows = [
        mel[chunk.first_frame : chunk.end_frame] for mel, plan in zip(mels, plans, strict=True) for chunk in plan
    ]
    parts = iter(vocode(decoder, windows))
    return [torch.cat([next(parts)[chunk.first_sample : chunk.end_sample] for chunk in plan]) for plan in plans]


@torch.inference_mode()
def decode_mels(decoder: WaveformDecoder, latents: Sequence[Tensor]) -> list[Tensor]:
    """Decodes latents [C, H, W] to as many mel spectrograms [T, M], in the decoder's dtype and on its device.

    Equal lengths share a call; with a compiled VAE, all lengths of a bucket do. Beyond `MAX_WHOLE_FRAMES`, each is
    decoded alone, in chunks. Raises `NonFiniteError` for non-finite values.
    """

    def decode(batch: Tensor) -> Tensor:
        decoder.before_forward()
        scaled = batch.to(decoder.device, decoder.dtype) * (1 / decoder.vae.config.scaling_factor)
        if batch.shape[2] > MAX_WHOLE_FRAMES:
            # On a GPU whoever is let in would need memory beside that of the whole clip.
            between = decoder.before_forward if decoder.device.type == "cpu" else lambda: None
            mel: Tensor = decode_chunked(decoder.vae, scaled, between_chunks=between).squeeze(1)
        else:
            mel = decoder.vae.decode(scaled, return_dict=False)[0].squeeze(1)
        _check_finite("VAE", mel)
        return mel

    def per_call(latent: Tensor) -> int:
        frames = latent.shape[1]
        return 1 if frames > MAX_WHOLE_FRAMES else decoder.max_latent_frames_per_call // frames

    def decode_eagerly(items: Sequence[Tensor]) -> list[Tensor]:
        return _map_equal_shapes(decode, items, per_call)

    if decoder.compiled is None:
        return decode_eagerly(latents)
    vae, mel_frames = decoder.compiled.vae, 2 ** (len(decoder.vae.config.block_out_channels) - 1)

    def decode_compiled(items: Sequence[Tensor]) -> list[Tensor]:
        scaled = [item.to(decoder.device, decoder.dtype) * (1 / decoder.vae.config.scaling_factor) for item in items]

        def decode_padded(batch: Tensor, valid: Tensor) -> Tensor:
            decoder.before_forward()
            return vae(batch, valid)

        padded = map_in_buckets(decode_padded, scaled, vae.buckets, decoder.device, decoder.dtype)
        mels = [mel[0, : item.shape[1] * mel_frames] for mel, item in zip(padded, items, strict=True)]
        _check_finite("VAE", *mels)
        return mels

    return _map_either(decode_compiled, decode_eagerly, [vae.buckets.fits(item.shape[1]) for item in latents], latents)


@torch.inference_mode()
def vocode(decoder: WaveformDecoder, windows: Sequence[Tensor]) -> list[Tensor]:
    """Turns windows [L, M] of mel spectrograms into as many waveforms, float32 on the host.

    Raises `NonFiniteError` for non-finite values.
    """

    def decode(batch: Tensor) -> Tensor:
        decoder.before_forward()
        waveforms: Tensor = decoder.vocoder(batch.to(decoder.device, decoder.dtype)).to("cpu", torch.float32)
        _check_finite("vocoder", waveforms)
        return waveforms

    # On a CPU the last bits depend on the batch size. Decode one window per call (no slower at the official size), so
    # that its output does not depend on the batch.
    on_cpu = decoder.device.type == "cpu"

    def decode_eagerly(items: Sequence[Tensor]) -> list[Tensor]:
        return _map_equal_shapes(decode, items, lambda item: 1 if on_cpu else MAX_MEL_FRAMES_PER_CALL // len(item))

    if decoder.compiled is None:
        return decode_eagerly(windows)
    vocoder = decoder.compiled.vocoder

    def decode_compiled(items: Sequence[Tensor]) -> list[Tensor]:
        def decode_padded(batch: Tensor, valid: Tensor) -> Tensor:
            decoder.before_forward()
            # One copy to the host per call: each waits for the device.
            return vocoder(batch, valid).to("cpu", torch.float32)

        padded = map_in_buckets(decode_padded, items, vocoder.buckets, decoder.device, decoder.dtype)
        waveforms = [
            waveform[: decoder.reach.num_samples(len(item))] for waveform, item in zip(padded, items, strict=True)
        ]
        _check_finite("vocoder", *waveforms)
        return waveforms

    return _map_either(decode_compiled, decode_eagerly, [vocoder.buckets.fits(len(item)) for item in windows], windows)


def _map_either(
    first: Callable[[Sequence[Tensor]], list[Tensor]],
    second: Callable[[Sequence[Tensor]], list[Tensor]],
    choices: Sequence[bool],
    items: Sequence[Tensor],
) -> list[Tensor]:
    """Maps the chosen items with `first` and all others with `second`; returns the results in order."""
    firsts = iter(first([item for item, chosen in zip(items, choices, strict=True) if chosen]))
    seconds = iter(second([item for item, chosen in zip(items, choices, strict=True) if not chosen]))
    return [next(firsts if chosen else seconds) for chosen in choices]


def _map_equal_shapes(
    function: Callable[[Tensor], Tensor], items: Sequence[Tensor], per_call: Callable[[Tensor], int]
) -> list[Tensor]:
    """Maps items with `function`, in batches of one shape: `per_call(item)` at a time, and at least one."""
    results: list[Tensor | None] = [None] * len(items)
    by_shape: dict[torch.Size, list[int]] = {}
    for index, item in enumerate(items):
        by_shape.setdefault(item.shape, []).append(index)
    for indices in by_shape.values():
        size = max(1, per_call(items[indices[0]]))
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            for index, result in zip(part, function(torch.stack([items[i] for i in part])), strict=True):
                results[index] = result
    return [result for result in results if result is not None]


def _check_finite(part: str, *values: Tensor) -> None:
    # Looked at together, since each look waits for the device.
    finite = [torch.isfinite(faults.at(f"decoder.{part}", value)).all() for value in values]
    if finite and not bool(torch.stack(finite).all()):
        raise NonFiniteError(f"decoder: the {part} gave non-finite values")

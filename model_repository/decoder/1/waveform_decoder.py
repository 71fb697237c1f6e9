"""Latents to waveforms: the VAE's decoder, and the vocoder chunk by chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import SpeechT5HifiGan

from audioldm2_triton.errors import InternalError
from vocoder_chunks import VocoderReach, plan_chunks, vocoder_reach

MAX_LATENT_FRAMES_PER_CALL: Final = 2048
"""Latent frames that the VAE decodes together, 80 s of audio: bounds the memory, whatever the number of requests."""

MAX_MEL_FRAMES_PER_CALL: Final = 8192
"""The same for the vocoder on a GPU."""


@dataclass(frozen=True)
class WaveformDecoder:
    """The decoding parts of a checkpoint, in evaluation mode on one device."""

    vae: Any  # AutoencoderKL without its encoder
    vocoder: SpeechT5HifiGan
    reach: VocoderReach
    device: torch.device
    dtype: torch.dtype

    @property
    def sampling_rate(self) -> int:
        return self.vocoder.config.sampling_rate


def load_waveform_decoder(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> WaveformDecoder:
    vae = AutoencoderKL.from_pretrained(str(checkpoint / "vae"), torch_dtype=dtype, local_files_only=True)
    del vae.encoder, vae.quant_conv
    vocoder: Any = SpeechT5HifiGan.from_pretrained(str(checkpoint / "vocoder"), dtype=dtype, local_files_only=True)
    return WaveformDecoder(vae.to(device).eval(), vocoder.to(device).eval(), vocoder_reach(vocoder), device, dtype)


def decode_waveforms(decoder: WaveformDecoder, latents: Sequence[Tensor]) -> list[Tensor]:
    """Decodes M latents [C, H, W] of any lengths.

    Returns M waveforms, float32 on the host, each as long as the vocoder makes it. Raises `InternalError` where a
    stage gives non-finite values.
    """
    mels = decode_mels(decoder, latents)
    plans = [plan_chunks(decoder.reach, len(mel)) for mel in mels]
    windows = [
        mel[chunk.first_frame : chunk.end_frame] for mel, plan in zip(mels, plans, strict=True) for chunk in plan
    ]
    parts = iter(vocode(decoder, windows))
    return [torch.cat([next(parts)[chunk.first_sample : chunk.end_sample] for chunk in plan]) for plan in plans]


@torch.inference_mode()
def decode_mels(decoder: WaveformDecoder, latents: Sequence[Tensor]) -> list[Tensor]:
    """The mel spectrograms [T, M] of as many latents [C, H, W], in the decoder's dtype and on its device.

    Equal lengths share a call. Raises `InternalError` for non-finite values.
    """

    def decode(batch: Tensor) -> Tensor:
        scaled = batch.to(decoder.device, decoder.dtype) * (1 / decoder.vae.config.scaling_factor)
        mel: Tensor = decoder.vae.decode(scaled, return_dict=False)[0].squeeze(1)
        _check_finite(mel, "VAE")
        return mel

    return _map_equal_shapes(decode, latents, lambda latent: MAX_LATENT_FRAMES_PER_CALL // latent.shape[1])


@torch.inference_mode()
def vocode(decoder: WaveformDecoder, windows: Sequence[Tensor]) -> list[Tensor]:
    """The waveforms, float32 on the host, of as many windows [L, M] of mel spectrograms.

    Raises `InternalError` for non-finite values.
    """

    def decode(batch: Tensor) -> Tensor:
        waveforms: Tensor = decoder.vocoder(batch.to(decoder.device, decoder.dtype)).to("cpu", torch.float32)
        _check_finite(waveforms, "vocoder")
        return waveforms

    # On a CPU the last bits depend on the shape of the batch: one window a call, which costs nothing at the size of
    # the official weights, makes a window's waveform the same in whatever company it comes.
    on_cpu = decoder.device.type == "cpu"
    return _map_equal_shapes(decode, windows, lambda window: 1 if on_cpu else MAX_MEL_FRAMES_PER_CALL // len(window))


def _map_equal_shapes(
    function: Callable[[Tensor], Tensor], items: Sequence[Tensor], per_call: Callable[[Tensor], int]
) -> list[Tensor]:
    """`function` of each item, called with batches of items of one shape, `per_call(item)` of them but at least one."""
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


def _check_finite(values: Tensor, part: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InternalError(f"decoder: the {part} gave non-finite values")

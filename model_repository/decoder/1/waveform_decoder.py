"""Latents to waveforms: the VAE's decoder and the vocoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import SpeechT5HifiGan

from audioldm2_triton.errors import InternalError

MAX_FRAMES_PER_CALL: Final = 2048
"""Latent frames that are decoded together, 80 s of audio: bounds the memory, whatever the number of requests."""


@dataclass(frozen=True)
class WaveformDecoder:
    """The decoding parts of a checkpoint, in evaluation mode on one device."""

    vae: Any  # AutoencoderKL without its encoder
    vocoder: SpeechT5HifiGan
    device: torch.device
    dtype: torch.dtype

    @property
    def sampling_rate(self) -> int:
        return self.vocoder.config.sampling_rate


def load_waveform_decoder(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> WaveformDecoder:
    vae = AutoencoderKL.from_pretrained(str(checkpoint / "vae"), torch_dtype=dtype, local_files_only=True)
    del vae.encoder, vae.quant_conv
    vocoder: Any = SpeechT5HifiGan.from_pretrained(str(checkpoint / "vocoder"), dtype=dtype, local_files_only=True)
    return WaveformDecoder(vae.to(device).eval(), vocoder.to(device).eval(), device, dtype)


@torch.inference_mode()
def decode_waveforms(decoder: WaveformDecoder, latents: Sequence[Tensor]) -> list[Tensor]:
    """Decodes M latents [C, H, W] of any lengths; equal lengths share a call.

    Returns M waveforms, float32 on the host, each as long as the vocoder makes it. Raises `InternalError` where a
    stage gives non-finite values.
    """
    waveforms: list[Tensor | None] = [None] * len(latents)
    by_length: dict[int, list[int]] = {}
    for index, latent in enumerate(latents):
        by_length.setdefault(latent.shape[1], []).append(index)
    for frames, indices in by_length.items():
        per_call = max(1, MAX_FRAMES_PER_CALL // frames)
        for first in range(0, len(indices), per_call):
            part = indices[first : first + per_call]
            for index, waveform in zip(part, _decode(decoder, torch.stack([latents[i] for i in part])), strict=True):
                waveforms[index] = waveform
    return [waveform for waveform in waveforms if waveform is not None]


def _decode(decoder: WaveformDecoder, latents: Tensor) -> Tensor:
    scaled = latents.to(decoder.device, decoder.dtype) * (1 / decoder.vae.config.scaling_factor)
    mel = decoder.vae.decode(scaled, return_dict=False)[0].squeeze(1)
    waveforms = decoder.vocoder(mel).to("cpu", torch.float32)
    if not bool(torch.isfinite(waveforms).all()):
        stage = "vocoder" if bool(torch.isfinite(mel).all()) else "VAE"
        raise InternalError(f"decoder: the {stage} gave non-finite values")
    return waveforms

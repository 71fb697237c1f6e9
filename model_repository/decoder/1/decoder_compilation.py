"""Compiles the VAE's decoder and the vocoder for a few shapes, before the first request."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from audioldm2_triton.server.compilation import for_fixed_shapes
from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.settings import Settings, uses_compiler
from decoder_buckets import Buckets
from masked_vae import decode_masked
from masked_vocoder import vocode_masked
from vocoder_chunks import CHUNK_FRAMES
from waveform_decoder import (
    MAX_LATENT_FRAMES_PER_CALL,
    MAX_MEL_FRAMES_PER_CALL,
    CompiledPart,
    CompiledParts,
    WaveformDecoder,
)

logger = logging.getLogger(__name__)

ROWS_ON_GPU: Final = (1, 2, 4, 8)
# On a CPU each shape takes tens of seconds to compile, and rows one by one cost no more than rows together.
ROWS_ON_CPU: Final = (1,)


def compile_for_settings(decoder: WaveformDecoder, settings: Settings, geometry: AudioGeometry) -> WaveformDecoder:
    """Compiles the decoder for the settings' lengths."""
    lengths = settings.lengths_to_compile(geometry.native_audio_length_in_s)
    frames = tuple(sorted({geometry.latent_frames(length) for length in lengths}))
    rows = ROWS_ON_CPU if decoder.device.type == "cpu" else ROWS_ON_GPU
    latents = Buckets(rows, frames, MAX_LATENT_FRAMES_PER_CALL)
    windows = Buckets(rows, (CHUNK_FRAMES + 2 * decoder.reach.overlap_frames,), MAX_MEL_FRAMES_PER_CALL)
    return compile_decoder(decoder, geometry, latents, windows, use_compiler=uses_compiler(settings))


def compile_decoder(
    decoder: WaveformDecoder,
    geometry: AudioGeometry,
    latents: Buckets,
    windows: Buckets,
    backend: str | Callable[..., Any] = "inductor",
    use_compiler: bool = True,
) -> WaveformDecoder:
    """Compiles the decoder's VAE and vocoder for every bucket, and logs a line for each.

    Whatever fits a bucket is padded to it; everything else runs uncompiled. If the compiler fails, that is logged, and
    the decoder is returned as it was.

    Args:
        latents: buckets of latent frames.
        windows: buckets of mel frames; longer spectrograms are cut into windows of the largest.
    """

    def ready(forward: Callable[[Tensor, Tensor], Tensor], buckets: Buckets) -> CompiledPart:
        return CompiledPart(
            for_fixed_shapes(forward, decoder.device, len(buckets.shapes), use_compiler, backend), buckets
        )

    vae = ready(lambda batch, valid: decode_masked(decoder.vae, batch, valid), latents)
    vocoder = ready(lambda batch, valid: vocode_masked(decoder.vocoder, batch, valid), windows)
    mel_bins = geometry.latent_width * geometry.vae_scale_factor
    try:
        _warm_up(vae, "VAE, latents", (geometry.latent_channels,), geometry.latent_width, decoder)
        _warm_up(vocoder, "vocoder, mel spectrograms", (), mel_bins, decoder)
    except Exception as error:
        logger.error("decoder: compiling failed, going on without: %r", error)
        return decoder
    return replace(decoder, compiled=CompiledParts(vae, vocoder))


@torch.inference_mode()
def _warm_up(part: CompiledPart, name: str, channels: tuple[int, ...], width: int, decoder: WaveformDecoder) -> None:
    shapes = part.buckets.shapes
    for done, (rows, frames) in enumerate(shapes, 1):
        started = time.monotonic()
        batch = torch.zeros(rows, *channels, frames, width, device=decoder.device, dtype=decoder.dtype)
        part.function(batch, torch.tensor([frames] * rows, device=decoder.device)).cpu()
        seconds = time.monotonic() - started
        logger.info(
            "decoder: compiled %d of %d: %s of %d x %d frames, in %.1f s",
            done,
            len(shapes),
            name,
            rows,
            frames,
            seconds,
        )

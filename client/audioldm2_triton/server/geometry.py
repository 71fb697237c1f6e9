"""Converts seconds to latent frames and samples for one checkpoint, as its configurations say."""

import json
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AudioGeometry:
    sampling_rate: int  # Hz
    samples_per_frame: int  # of the mel spectrogram: the vocoder's upsampling
    vae_scale_factor: int  # mel frames per latent frame
    native_latent_frames: int  # what the UNet was trained on
    latent_channels: int
    latent_width: int  # mel bins over the VAE scale factor
    unet_downsampling: int  # latent frames of one frame at the UNet's lowest resolution

    @property
    def frame_length_in_s(self) -> float:
        return self.samples_per_frame / self.sampling_rate

    @property
    def native_audio_length_in_s(self) -> float:
        return self.native_latent_frames * self.vae_scale_factor * self.frame_length_in_s

    def latent_frames(self, audio_length_in_s: float) -> int:
        """Truncated to whole mel frames, then rounded up to whole latent frames, as the reference does."""
        return ceil(int(audio_length_in_s / self.frame_length_in_s) / self.vae_scale_factor)

    def window_frames(self, window_length_in_s: float) -> tuple[int, int]:
        """Returns the latent frames of a window and of the overlap, half of it; zeros for the length 0: no windows.

        Both are multiples of the UNet's total downsampling factor, so that windows begin and end on frames of its
        lowest resolution: the window is rounded up, the overlap down. With less overlap the sound's character changes
        at the seams.
        """
        if window_length_in_s == 0:
            return 0, 0
        unit = self.unet_downsampling
        window = max(2 * unit, ceil(self.latent_frames(window_length_in_s) / unit) * unit)
        return window, window // 2 // unit * unit

    def num_samples(self, audio_length_in_s: float) -> int:
        """Exactly this many samples are returned, as in the reference."""
        return int(audio_length_in_s * self.sampling_rate)


def read_audio_geometry(checkpoint: Path) -> AudioGeometry:
    """Reads the components' `config.json`. Raises `OSError` and `KeyError` for an incomplete checkpoint."""
    vocoder, vae, unet = (_read_config(checkpoint / part / "config.json") for part in ("vocoder", "vae", "unet"))
    vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return AudioGeometry(
        sampling_rate=vocoder["sampling_rate"],
        samples_per_frame=prod(vocoder["upsample_rates"]),
        vae_scale_factor=vae_scale_factor,
        native_latent_frames=unet["sample_size"],
        latent_channels=unet["in_channels"],
        latent_width=vocoder["model_in_dim"] // vae_scale_factor,
        unet_downsampling=2 ** (len(unet["block_out_channels"]) - 1),
    )


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    return config

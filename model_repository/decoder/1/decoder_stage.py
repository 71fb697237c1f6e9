"""Loads the stage as a server starts it: with its number of threads chosen, compiled, and warm."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.own_kernels import launch_on
from audioldm2_triton.server.residency import stage_residency
from audioldm2_triton.server.settings import Settings, resolve_compile, resolve_dtype
from audioldm2_triton.server.threads import set_measured_threads
from clap_scores import ClapScorer, load_clap_scorer
from decoder_compilation import compile_for_settings
from decoding import warm_up
from waveform_decoder import WaveformDecoder, load_waveform_decoder

MAX_LATENT_FRAMES_THAT_GIVE_WAY: Final = 128
"""Latent frames, 5 s of audio, that the VAE decodes together on a CPU while others may come."""


def load_decoder_stage(
    settings: Settings, geometry: AudioGeometry, device: torch.device
) -> tuple[WaveformDecoder, ClapScorer]:
    """Loads the decoding parts of the settings' checkpoint, ready for requests."""
    checkpoint, dtype = Path(settings.checkpoint), resolve_dtype(settings, device)
    launch_on(device)
    residency = stage_residency(settings, device)
    with residency:
        decoder = load_waveform_decoder(checkpoint, device, dtype)
        scorer = load_clap_scorer(checkpoint, device, dtype)
        residency.adopt(decoder.vae, decoder.vocoder, scorer.clap)
        if device.type == "cpu":
            set_measured_threads(partial(warm_up, decoder, scorer, geometry))
        if resolve_compile(settings, device):
            decoder = compile_for_settings(decoder, settings, geometry)
        warm_up(decoder, scorer, geometry)
    return replace(decoder, residency=residency), scorer


def interrupted(
    decoder: WaveformDecoder, scorer: ClapScorer, before_forward: Callable[[], None]
) -> tuple[WaveformDecoder, ClapScorer]:
    """Returns the same parts, which call `before_forward` before each of their forwards."""
    return replace(decoder, before_forward=before_forward), replace(scorer, before_forward=before_forward)


def giving_way(
    decoder: WaveformDecoder, scorer: ClapScorer, give_way: Callable[[], None], keep_on: Callable[[], None]
) -> tuple[WaveformDecoder, ClapScorer]:
    """Returns the parts for requests of low priority, which call `give_way` before each of their forwards.

    While another stage waits for the device (`offload`), they call `keep_on` instead, to be done sooner. On a CPU the
    VAE decodes fewer of them together; one clip of up to 41 s is still one forward.
    """

    def let_in() -> None:
        if decoder.residency.is_wanted:
            keep_on()
        else:
            give_way()

    longest = MAX_LATENT_FRAMES_THAT_GIVE_WAY if decoder.device.type == "cpu" else decoder.max_latent_frames_per_call
    return interrupted(replace(decoder, max_latent_frames_per_call=longest), scorer, let_in)

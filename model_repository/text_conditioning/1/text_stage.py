"""Loads the stage as a server starts it: with its number of threads chosen, compiled, and warm."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton import contract
from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.residency import stage_residency
from audioldm2_triton.server.settings import Settings, resolve_compile, resolve_dtype, uses_compiler
from audioldm2_triton.server.threads import set_measured_threads
from row_texts import row_texts
from text_buckets import TextBuckets
from text_compilation import compile_text_encoders
from text_encoders import TextEncoders, encode_texts, load_text_encoders

_TYPICAL: Final = GenerationRow(
    prompt="A dog barks twice in the distance while leaves rustle in the wind",
    negative_prompt=contract.DEFAULT_NEGATIVE_PROMPT,
    audio_length_in_s=1.0,
    num_inference_steps=contract.DEFAULT_NUM_INFERENCE_STEPS,
    guidance_scale=contract.DEFAULT_GUIDANCE_SCALE,
    num_waveforms_per_prompt=1,
    seed=0,
    scheduler=contract.DEFAULT_SCHEDULER,
    return_scores=False,
    transcription="The quick brown fox jumps over the lazy dog",
)

logger = logging.getLogger(__name__)


def load_text_stage(settings: Settings, device: torch.device) -> TextEncoders:
    """Loads the encoders of the settings' checkpoint, ready for requests."""
    residency = stage_residency(settings, device)
    with residency:
        dtype = resolve_dtype(settings, device)
        encoders = load_text_encoders(Path(settings.checkpoint), device, dtype, settings.max_new_tokens)
        residency.adopt(encoders.clap, encoders.second, encoders.projection, encoders.language_model)
        if device.type == "cpu":
            set_measured_threads(partial(_encode_typical, encoders))
        if encoders.speaks:
            logger.info("not compiled: the checkpoint speaks")
        elif resolve_compile(settings, device):
            encoders = compile_text_encoders(encoders, TextBuckets(), use_compiler=uses_compiler(settings))
        # The first request should not bear one-time costs.
        _encode_typical(encoders)
    return replace(encoders, residency=residency)


def _encode_typical(encoders: TextEncoders) -> None:
    """Encodes a prompt and its negative prompt."""
    texts = row_texts(encoders, _TYPICAL, full_negative_prompt=False)
    keys = [key for key in (texts.prompt, texts.negative) if key is not None]
    encode_texts(encoders, [key.text for key in keys], [key.tokens for key in keys], [key.length for key in keys])

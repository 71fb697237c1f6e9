"""The stage as a server starts it: loaded, given its threads, compiled, and warm."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton.residency import stage_residency
from audioldm2_triton.settings import Settings, resolve_compile, resolve_dtype
from audioldm2_triton.threads import set_measured_threads
from text_buckets import TextBuckets
from text_compilation import compile_with_cache
from text_encoders import TextEncoders, encode_texts, load_text_encoders, tokenize_t5

STAGE: Final = "text_conditioning"
_TYPICAL: Final = ("A dog barks twice in the distance while leaves rustle in the wind", "")


def load_text_stage(settings: Settings, device: torch.device) -> TextEncoders:
    """The encoders of the settings' checkpoint, ready for requests."""
    residency = stage_residency(settings, device)
    with residency:
        encoders = load_text_encoders(Path(settings.checkpoint), device, resolve_dtype(settings, device))
        residency.adopt(encoders.clap, encoders.t5, encoders.projection, encoders.language_model)
        if device.type == "cpu":
            set_measured_threads(partial(_encode_typical, encoders))
        if resolve_compile(settings, device):
            encoders = compile_with_cache(encoders, TextBuckets(), settings, STAGE)
        # The first request should not pay for what happens once.
        _encode_typical(encoders)
    return replace(encoders, residency=residency)


def _encode_typical(encoders: TextEncoders) -> None:
    """A prompt and its negative prompt, as long as the prompt."""
    length = len(tokenize_t5(encoders, _TYPICAL[0]))
    tokens = [tokenize_t5(encoders, text, length) for text in _TYPICAL]
    encode_texts(encoders, _TYPICAL, tokens, [length] * len(_TYPICAL))

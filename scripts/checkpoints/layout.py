"""The layout of a checkpoint: its components, their classes and their files."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

MODEL_INDEX: Final = "model_index.json"
REVISION_FILE: Final = "revision.json"

CLASSES: Final[Mapping[str, tuple[str, ...]]] = {
    "feature_extractor": ("ClapFeatureExtractor",),
    "language_model": ("GPT2LMHeadModel", "GPT2Model"),
    "projection_model": ("AudioLDM2ProjectionModel",),
    "scheduler": (),  # whichever: the server builds its own from its config
    "text_encoder": ("ClapModel",),
    "text_encoder_2": ("T5EncoderModel", "VitsModel"),
    "tokenizer": ("RobertaTokenizer", "RobertaTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast", "VitsTokenizer"),
    "unet": ("AudioLDM2UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "vocoder": ("SpeechT5HifiGan",),
}
"""Every component, and the classes that `model_index.json` may name for it."""

CONFIG_FILES: Final[Mapping[str, str]] = {
    "feature_extractor": "preprocessor_config.json",
    "language_model": "config.json",
    "projection_model": "config.json",
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "unet": "config.json",
    "vae": "config.json",
    "vocoder": "config.json",
}

WEIGHTS: Final[Mapping[str, str]] = {
    "language_model": "model",
    "projection_model": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "vocoder": "model",
}
"""The components that have weights, and what the names of their files begin with."""

_WEIGHT_FILE: Final = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")
_VARIANT_FILE: Final = re.compile(r"(model|diffusion_pytorch_model)\.(?!safetensors)([\w-]+)\.safetensors")
"""In one file only: an index names the parts of several, with the variant."""
_TEXT_SUFFIXES: Final = (".json", ".txt", ".model")  # configs, merges, SentencePiece
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def belongs(path: str) -> bool:
    """Returns whether a file of a repository belongs to the checkpoint: no pickles, variants or other components."""
    parts = PurePosixPath(path)
    if path == MODEL_INDEX:
        return True
    if len(parts.parts) != 2 or parts.parts[0] not in CLASSES:
        return False
    return parts.suffix in _TEXT_SUFFIXES or _WEIGHT_FILE.fullmatch(parts.name) is not None


def is_weights(path: str, stem: str) -> bool:
    """Returns whether a file of a component holds weights, or a part of them, whose names begin with `stem`."""
    name = PurePosixPath(path).name
    return name.startswith(stem) and _WEIGHT_FILE.fullmatch(name) is not None


def variant_of(path: str, stem: str) -> str:
    """Returns the variant of weights in one file: `fp16` of `model.fp16.safetensors`; empty for any other file."""
    match = _VARIANT_FILE.fullmatch(PurePosixPath(path).name)
    return match[2] if match is not None and match[1] == stem else ""


def plain_name(path: str, variant: str) -> str:
    """Returns the path of a file without this variant in its name."""
    stem = WEIGHTS.get(PurePosixPath(path).parts[0], "")
    if variant and variant_of(path, stem) == variant:
        return str(PurePosixPath(path).with_name(f"{stem}.safetensors"))
    return path


def is_pickle(name: str) -> bool:
    """Returns whether loading a file as weights could run code."""
    return name.endswith(_PICKLES)

"""Puts the trained parts together: as a pipeline in memory, and as the checkpoint on disk."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AudioLDM2Pipeline, DDIMScheduler
from transformers import ClapFeatureExtractor

from checkpoints.layout import CONFIG_FILES, MODEL_INDEX
from checkpoints.shapes import component_config, model_index

from . import parts

MAX_SIZE_IN_BYTES: Final = 15_000_000
_CARD: Final = "README.md"
# transformers would otherwise load in the precision of the file, diffusers in single precision, and the two do not mix.
_TRANSFORMERS: Final = ("text_encoder", "text_encoder_2", "language_model", "vocoder")


def pipeline(
    tokenizers: tuple[Any, Any],
    clap: Any,
    t5: Any,
    reader: Any,
    vae: Any = None,
    unet: Any = None,
    vocoder: Any = None,
) -> Any:
    """The reference pipeline of these parts; those left out are untrained."""
    return AudioLDM2Pipeline(
        vae=vae or parts.vae(),
        text_encoder=clap,
        text_encoder_2=t5,
        projection_model=reader.projection,
        language_model=reader.gpt2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        feature_extractor=ClapFeatureExtractor(**component_config("base", "feature_extractor")),
        unet=unet or parts.unet(),
        scheduler=DDIMScheduler.from_config(component_config("base", "scheduler")),
        vocoder=vocoder or parts.vocoder(),
    )


def load(checkpoint: Path) -> Any:
    """The reference pipeline of a saved checkpoint, in single precision; always a new one."""
    return AudioLDM2Pipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)


def save(pipe: Any, scaling_factor: float, vocabulary: int, out: Path) -> int:
    """Writes the checkpoint in half precision into `out`, in place of what is there; returns its size in bytes.

    The configs are those of `parts`, without what this version of the libraries adds. A model card in `out` stays.
    Raises `ValueError` for more than `MAX_SIZE_IN_BYTES`.
    """
    changes: dict[str, dict[str, Any]] = {component: {"dtype": "float32"} for component in _TRANSFORMERS}
    changes["vae"] = {"scaling_factor": scaling_factor}
    changes["text_encoder_2"] |= {"vocab_size": vocabulary}
    for component in CONFIG_FILES:
        shutil.rmtree(out / component, ignore_errors=True)
        # Contiguous, since safetensors refuses weights in channels-last.
        module = getattr(pipe, component)
        if isinstance(module, torch.nn.Module):
            module = module.to(torch.float16)
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        module.save_pretrained(out / component)
        if component.startswith("tokenizer"):
            _forget_origin(out / component / CONFIG_FILES[component])
            continue
        (out / component / "generation_config.json").unlink(missing_ok=True)
        _write(out / component / CONFIG_FILES[component], parts.config(component, **changes.get(component, {})))
    _write(out / MODEL_INDEX, model_index())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != _CARD)
    if size > MAX_SIZE_IN_BYTES:
        raise ValueError(f"size of the checkpoint: got {size} bytes but expected at most {MAX_SIZE_IN_BYTES}")
    return size


def _forget_origin(path: Path) -> None:
    """Removes from a saved tokenizer the note of how it was loaded."""
    content = json.loads(path.read_text(encoding="utf-8"))
    _write(path, {key: value for key, value in content.items() if key not in ("is_local", "local_files_only")})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Builds checkpoints with random weights, in the layout that `AudioLDM2Pipeline.from_pretrained` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    VitsConfig,
    VitsModel,
)

from .calibration import centre_clap, decode_noise, scale_waveform
from .layout import CONFIG_FILES, MODEL_INDEX
from .random_weights import damp_attention, generator, pass_noise_through, randomise
from .shapes import SIZES, SPEAKING, TRANSCRIPTION_LENGTH, Config, component_config, model_index
from .vocabularies import SENTENCES, roberta_tokenizer, save_vits_tokenizer, t5_tokenizer

_PEAK: Final = 0.3  # of the waveform, where full scale is 1
_PERTURBATION: Final = 0.05
_CLIPS: Final = 4
_CLIP_LENGTH: Final = 250  # latent frames: 10 s


def build(size: str, out: Path, seed: int = 0, report: Callable[[str], None] = lambda _: None) -> None:
    """Builds a checkpoint in the new directory `out`; the same `size` and `seed` give the same weights.

    They are identical on the same machine with the same number of threads, and within rounding otherwise.

    One component is in memory at a time, except for the VAE and the vocoder, which is scaled on the VAE's mels.
    `report` is called with the name of each component before it is built.

    Raises `ValueError` for an unknown size, and `FileExistsError` if `out` exists and is not empty.
    """
    if size not in SIZES:
        raise ValueError(f"size: got {size!r} but expected one of {', '.join(SIZES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: got an existing path but expected a new directory")
    out.mkdir(parents=True, exist_ok=True)
    for component in ("scheduler", "feature_extractor"):
        _write_config(size, component, out)
    roberta_tokenizer().save_pretrained(out / "tokenizer")
    if size in SPEAKING:
        save_vits_tokenizer(out / "tokenizer_2", TRANSCRIPTION_LENGTH)
    else:
        t5_tokenizer().save_pretrained(out / "tokenizer_2")

    constructors = _CONSTRUCTORS | ({"text_encoder_2": _vits} if size in SPEAKING else {})
    for component, construct in constructors.items():
        report(component)
        _save(construct(component_config(size, component), generator(seed, component)), size, component, out)

    _build_calibrated(size, out, seed, report)
    # Last, so that an interrupted build does not look complete.
    _write_json(model_index(size), out / MODEL_INDEX)


def _build_calibrated(size: str, out: Path, seed: int, report: Callable[[str], None]) -> None:
    """The components that are adjusted to what they are fed with: the VAE's mels, the vocoder's waveforms."""
    report("vae")
    vae = _vae(component_config(size, "vae"), generator(seed, "vae"))
    _save(vae, size, "vae", out)
    report("vocoder")
    vocoder = _vocoder(component_config(size, "vocoder"), generator(seed, "vocoder"))
    mels = decode_noise(vae, (_CLIPS, _CLIP_LENGTH, vocoder.config.model_in_dim), generator(seed, "calibration"))
    del vae
    waveforms = scale_waveform(vocoder, mels, _PEAK)
    _save(vocoder, size, "vocoder", out)
    sampling_rate = vocoder.config.sampling_rate
    del vocoder
    report("text_encoder")
    clap = _clap(component_config(size, "text_encoder"), generator(seed, "text_encoder"))
    extractor = ClapFeatureExtractor(**component_config(size, "feature_extractor"))
    tokens = roberta_tokenizer()(list(SENTENCES), padding=True, return_tensors="pt")
    centre_clap(clap, waveforms, sampling_rate, extractor, tokens)
    _save(clap, size, "text_encoder", out)


def _projection_model(config: Config, generator: torch.Generator) -> Any:
    model = AudioLDM2ProjectionModel.from_config(config)
    randomise(model, generator)
    if model.use_learned_position_embedding is not None:
        torch.nn.init.normal_(model.learnable_positional_embedding, generator=generator)
    return model


def _language_model(config: Config, generator: torch.Generator) -> Any:
    model = GPT2LMHeadModel(GPT2Config(**config))
    randomise(model, generator, gain=1.5)
    return model


def _t5(config: Config, generator: torch.Generator) -> Any:
    model = T5EncoderModel(T5Config(**config))
    randomise(model, generator)
    damp_attention(model, config["d_kv"])
    return model


def _vits(config: Config, generator: torch.Generator) -> Any:
    model = VitsModel(VitsConfig(**config))
    randomise(model, generator)
    return model


def _unet(config: Config, generator: torch.Generator) -> Any:
    model = AudioLDM2UNet2DConditionModel.from_config(config)
    randomise(model, generator)
    pass_noise_through(model, _PERTURBATION)
    return model


def _vae(config: Config, generator: torch.Generator) -> Any:
    model = AutoencoderKL.from_config(config)
    randomise(model, generator)
    return model


def _vocoder(config: Config, generator: torch.Generator) -> Any:
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**config))
    randomise(model, generator)
    return model


def _clap(config: Config, generator: torch.Generator) -> Any:
    model = ClapModel(ClapConfig(**config))
    randomise(model, generator)
    for scale in (model.logit_scale_a, model.logit_scale_t):
        torch.nn.init.constant_(scale, torch.tensor(config["logit_scale_init_value"]).log().item())
    return model


_CONSTRUCTORS: Final[dict[str, Callable[[Config, torch.Generator], Any]]] = {
    "projection_model": _projection_model,
    "language_model": _language_model,
    "text_encoder_2": _t5,
    "unet": _unet,
}


def _save(model: Any, size: str, component: str, out: Path) -> None:
    model.save_pretrained(out / component)
    (out / component / "generation_config.json").unlink(missing_ok=True)
    # The config as it is on the hub, without what this version of the library adds.
    _write_config(size, component, out)


def _write_config(size: str, component: str, out: Path) -> None:
    (out / component).mkdir(exist_ok=True)
    _write_json(component_config(size, component), out / component / CONFIG_FILES[component])


def _write_json(content: Config, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""The shapes a checkpoint can be built in: the component configs of the official ones, and tiny ones for tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .layout import CONFIG_FILES, MODEL_INDEX

Config = dict[str, Any]

REFERENCE_CONFIGS: Final = Path(__file__).parent / "reference_configs"

# Music differs from base in its training data only. A component without a config of its own has the one of base.
_OFFICIAL: Final = {"base": "audioldm2", "music": "audioldm2", "large": "audioldm2-large"}

# The topology of base (four levels, two cross-attention streams), as narrow as it gets. All widths that meet differ, so
# that no mix-up goes unnoticed. One layer per block instead of two: a step is bound by the number of kernels, whatever
# their size (57 ms at one position with two layers, 8 channels wide, on one core).
_TINY_CLAP: Final = 40
_TINY_T5: Final = 48
_TINY_GPT2: Final = 32
_TINY: Final[Mapping[str, Config]] = {
    "language_model": {"n_embd": _TINY_GPT2, "n_head": 2, "n_layer": 2, "vocab_size": 64}
    | {"bos_token_id": 63, "eos_token_id": 63},
    "projection_model": {
        "text_encoder_dim": _TINY_CLAP,
        "text_encoder_1_dim": _TINY_T5,
        "langauge_model_dim": _TINY_GPT2,
    },
    "text_encoder": {
        "projection_dim": _TINY_CLAP,
        "audio_config": {
            "depths": [2, 1, 1, 1],
            "hidden_size": 128,
            "num_attention_heads": [1, 2, 4, 8],
            "patch_embeds_hidden_size": 16,
        },
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 640,
        },
    },
    "text_encoder_2": {
        "d_ff": 96,
        "d_kv": 8,
        "d_model": _TINY_T5,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 640,
    },
    "unet": {
        "attention_head_dim": 2,
        "block_out_channels": [16, 16, 24, 32],
        "cross_attention_dim": [[None, _TINY_GPT2, _TINY_T5]] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "vae": {"block_out_channels": [16, 24, 32], "norm_num_groups": 8},
    "vocoder": {"upsample_initial_channel": 64},
}


# The tiny ones that have the whole topology of an official one, with two layers per block; and one that speaks: no
# reference config of its kind is at hand, so that its own parts stand here.
_TINY_SPEECH: Final = 20
TRANSCRIPTION_LENGTH: Final = 48  # tokens
_VITS: Final[Config] = {
    "architectures": ["VitsModel"],
    "duration_predictor_filter_channels": 8,
    "ffn_dim": 40,
    "flow_size": 8,
    "hidden_size": _TINY_SPEECH,
    "model_type": "vits",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "posterior_encoder_num_wavenet_layers": 1,
    "prior_encoder_num_wavenet_layers": 1,
    "sampling_rate": 16000,
    "spectrogram_bins": 9,
    "upsample_initial_channel": 16,
    "vocab_size": 183,
}
_TINY_VARIANTS: Final[Mapping[str, Mapping[str, Config]]] = {
    "tiny": {},
    "tiny-music": {"unet": {"layers_per_block": 2}},
    "tiny-large": {
        "unet": {"layers_per_block": 2, "cross_attention_dim": [[None, _TINY_GPT2, _TINY_T5, None]] * 4}
        | {"transformer_layers_per_block": 2}
    },
    "tiny-speech": {
        "projection_model": {
            "max_seq_length": TRANSCRIPTION_LENGTH,
            "text_encoder_1_dim": _TINY_SPEECH,
            "use_learned_position_embedding": True,
        },
        "unet": {"cross_attention_dim": [[None, _TINY_GPT2, _TINY_SPEECH]] * 4},
    },
}
SPEAKING: Final = ("tiny-speech",)
SIZES: Final = (*_TINY_VARIANTS, *_OFFICIAL)


def model_index(size: str = "base") -> Config:
    """The `model_index.json` of a shape."""
    index = _read(REFERENCE_CONFIGS / "audioldm2" / MODEL_INDEX)
    if size in SPEAKING:
        index |= {"text_encoder_2": ["transformers", "VitsModel"], "tokenizer_2": ["transformers", "VitsTokenizer"]}
    return index


def component_config(size: str, component: str) -> Config:
    """The config of one component in one of `SIZES`."""
    if size not in SIZES:
        raise ValueError(f"size: got {size!r} but expected one of {', '.join(SIZES)}")
    if size in SPEAKING and component == "text_encoder_2":
        return dict(_VITS)
    file = CONFIG_FILES[component]
    own = REFERENCE_CONFIGS / _OFFICIAL.get(size, "audioldm2") / component / file
    config = _read(own if own.exists() else REFERENCE_CONFIGS / "audioldm2" / component / file)
    if size not in _TINY_VARIANTS:
        return config
    return _merged(_merged(config, _TINY.get(component, {})), _TINY_VARIANTS[size].get(component, {}))


def _merged(config: Config, changes: Config) -> Config:
    """`config` with `changes`, key by key in the nested ones."""
    merged = dict(config)
    for key, value in changes.items():
        merged[key] = _merged(config[key], value) if isinstance(value, dict) else value
    return merged


def _read(path: Path) -> Config:
    config: Config = json.loads(path.read_text(encoding="utf-8"))
    return config

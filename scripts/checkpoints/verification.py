"""Verifies that a directory holds a complete checkpoint: every component, config key and tensor shape."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from audioldm2_triton.server.speech import END_TOKEN, SPEECH_ENCODER
from audioldm2_triton.server.text_lengths import MAX_TOKENIZER_LENGTH

from .layout import CLASSES, CONFIG_FILES, MODEL_INDEX, WEIGHTS, is_pickle

Shape = tuple[int, ...]

_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "feature_extractor": ("sampling_rate", "feature_size", "fft_window_size", "hop_length", "max_length_s", "padding"),
    "language_model": ("n_embd", "n_head", "n_layer", "n_positions", "max_new_tokens"),
    "projection_model": ("text_encoder_dim", "text_encoder_1_dim", "langauge_model_dim"),
    "scheduler": ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"),
    "text_encoder": ("audio_config", "text_config", "projection_dim"),
    "text_encoder_2": ("d_ff", "d_kv", "d_model", "feed_forward_proj", "num_heads", "num_layers", "vocab_size"),
    "tokenizer": (),
    "tokenizer_2": (),
    "unet": (
        "attention_head_dim",
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "in_channels",
        "layers_per_block",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "up_block_types",
    ),
    "vae": ("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor"),
    "vocoder": ("model_in_dim", "sampling_rate", "upsample_initial_channel", "upsample_kernel_sizes", "upsample_rates"),
}
"""Keys without which the library's default would silently make another model."""
_REQUIRED_OF_CLASS: Final[Mapping[str, tuple[str, ...]]] = {
    SPEECH_ENCODER: ("ffn_dim", "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
}
_SECOND_TOKENIZERS: Final[Mapping[str, str]] = {"T5EncoderModel": "T5Tokenizer", SPEECH_ENCODER: "VitsTokenizer"}

# In a file but not in this version's model, or the other way round; and the head of GPT-2, which is not used. Complete
# T5 models also have a decoder.
_OPTIONAL: Final = (
    "position_ids",
    "token_type_ids",
    "relative_position_index",
    "num_batches_tracked",
    "attn.bias",
    "attn.masked_bias",
    "lm_head.weight",
    "logit_scale_a",
    "logit_scale_t",
)
_OPTIONAL_PREFIXES: Final[Mapping[str, tuple[str, ...]]] = {"text_encoder_2": ("decoder.",)}
_VITS_READ: Final = "text_encoder."  # the only part of a VITS that AudioLDM 2 uses
_VOCODER_STATISTICS: Final = ("mean", "scale")
_OLD_ATTENTION: Final = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_FAULTS_SHOWN: Final = 3  # of one kind in one component


@dataclass(frozen=True)
class Fault:
    """One fault of a checkpoint."""

    component: str
    message: str

    def __str__(self) -> str:
        return f"{self.component}: {self.message}"


def verify(directory: Path) -> list[Fault]:
    """Returns the faults of the checkpoint in `directory`; an empty list if it is complete.

    Reads only the headers of the weights: a gigabyte takes no longer than a megabyte.
    """
    index = _read_json(directory / MODEL_INDEX)
    if isinstance(index, str):
        return [Fault(MODEL_INDEX, index)]
    configs: dict[str, dict[str, Any]] = {}
    shapes: dict[str, dict[str, Shape]] = {}
    faults: list[Fault] = []
    for component in CLASSES:
        found = list(_faults_of_files(directory, component, index, configs, shapes))
        faults += [Fault(component, message) for message in found]
    faults += _faults_of_widths(configs)
    faults += _faults_of_speech(index, configs)
    # After the cheap checks, because this imports the libraries, which takes seconds.
    broken = {fault.component for fault in faults}
    for component in CLASSES:
        if component not in broken:
            name = index[component][1]
            if component in WEIGHTS:
                messages = _faults_of_weights(component, name, configs[component], shapes[component])
            else:
                messages = _faults_of_loading(directory / component, component, name, configs)
            faults += [Fault(component, message) for message in messages]
    return faults


def _faults_of_files(
    directory: Path,
    component: str,
    index: dict[str, Any],
    configs: dict[str, dict[str, Any]],
    shapes: dict[str, dict[str, Shape]],
) -> Iterator[str]:
    """Checks the files of one component, and stores what it reads in `configs` and `shapes`."""
    entry = index.get(component)
    if not isinstance(entry, list) or len(entry) != 2:
        yield f"got {entry!r} in {MODEL_INDEX} but expected [library, class]"
        return
    if CLASSES[component] and entry[1] not in CLASSES[component]:
        yield f"got the class {entry[1]!r} in {MODEL_INDEX} but expected {' or '.join(CLASSES[component])}"
        return
    folder = directory / component
    if not folder.is_dir():
        yield f"is missing: there is no directory {folder}"
        return
    config = _read_json(folder / CONFIG_FILES[component])
    if isinstance(config, str):
        yield config
    else:
        configs[component] = config
        missing = [key for key in _REQUIRED_OF_CLASS.get(entry[1], _REQUIRED[component]) if key not in config]
        for key in missing:
            yield f"{CONFIG_FILES[component]} lacks the key {key!r}"
    if component in WEIGHTS:
        try:
            shapes[component] = read_shapes(folder, WEIGHTS[component])
        except ValueError as error:
            yield str(error)


def read_shapes(folder: Path, stem: str) -> dict[str, Shape]:
    """Returns the shapes of all tensors in `folder`, from one file or several.

    Raises `ValueError` for weights that are missing, only pickled, truncated or spread over files that do not match.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if is_pickle(path.name))
        if pickles:
            raise ValueError(f"got pickled weights only ({', '.join(pickles)}) but expected {single.name}")
        raise ValueError(f"has no weights: neither {single.name} nor {index.name}")
    content = _read_json(index)
    if isinstance(content, str):
        raise ValueError(content)
    shapes: dict[str, Shape] = {}
    placed: Mapping[str, str] = content.get("weight_map", {})
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index.name} names {name}, which is missing")
        shapes |= _read_header(folder / name)
    absent = sorted(key for key in placed if key not in shapes)
    if absent:
        raise ValueError(f"{index.name} names {_some(absent)}, which no file has")
    return shapes


def _read_header(path: Path) -> dict[str, Shape]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as weights:
            return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is not a complete safetensors file: {error}") from error


def _faults_of_weights(component: str, name: str, config: dict[str, Any], shapes: dict[str, Shape]) -> Iterator[str]:
    try:
        expected, tied = _expected_shapes(component, name, config)
    except Exception as error:  # whatever the library makes of a bad config
        yield f"{name} cannot be made from its config: {' '.join(str(error).split())}"
        return
    found = {_current_key(component, key): shape for key, shape in shapes.items()}
    expected = {_current_key(component, key): shape for key, shape in expected.items()}
    if name == SPEECH_ENCODER:
        found, expected = (
            {key: shape for key, shape in shapes.items() if key.startswith(_VITS_READ)} for shapes in (found, expected)
        )
    missing = [key for key in expected if key not in found and key not in tied and not _optional(component, key)]
    extra = [key for key in found if key not in expected and not _optional(component, key)]
    if missing:
        yield f"lacks {_some(missing)}"
    if extra:
        yield f"has {_some(extra)}, which {name} with this config lacks"
    wrong = [key for key in expected if key in found and found[key] != expected[key] and not _optional(component, key)]
    for key in wrong[:_FAULTS_SHOWN]:
        yield f"{key}: got the shape {list(found[key])} but expected {list(expected[key])}"
    if len(wrong) > _FAULTS_SHOWN:
        yield f"{len(wrong) - _FAULTS_SHOWN} more tensors of a wrong shape"


def _expected_shapes(component: str, name: str, config: dict[str, Any]) -> tuple[dict[str, Shape], set[str]]:
    """Returns the shapes of the model that `config` describes, and the keys that may be omitted as copies of others."""
    import torch

    model: Any
    with torch.device("meta"):
        if WEIGHTS[component] == "model":
            import transformers

            model_class = getattr(transformers, name)
            model = model_class(model_class.config_class(**config))
        elif component == "vae":
            from diffusers import AutoencoderKL

            model = AutoencoderKL.from_config(config)
        else:
            import diffusers.pipelines.audioldm2.modeling_audioldm2 as modeling

            model = getattr(modeling, name).from_config(config)
    tied = getattr(model, "_tied_weights_keys", None) or {}
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, set(tied)


def _current_key(component: str, key: str) -> str:
    """Returns the current name of a tensor, with or without the language model's head."""
    if component == "language_model":
        return key.removeprefix("transformer.")
    if component == "vae" and ".attentions." in key:
        for old, new in _OLD_ATTENTION.items():
            key = key.replace(old, new)
    return key


def _optional(component: str, key: str) -> bool:
    if component == "vocoder" and key in _VOCODER_STATISTICS:
        return True
    return key.endswith(_OPTIONAL) or key.startswith(_OPTIONAL_PREFIXES.get(component, "\0"))


def _faults_of_loading(folder: Path, component: str, name: str, configs: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Loads a component without weights, and compares a tokenizer's vocabulary with that of its encoder."""
    import diffusers
    import transformers

    library = diffusers if component == "scheduler" else transformers
    loader = getattr(library, name, None)
    if loader is None:
        yield f"got the class {name!r} in {MODEL_INDEX}, which {library.__name__} does not have"
        return
    try:
        loaded = loader.from_pretrained(folder)
    except Exception as error:  # whatever the library makes of a bad file
        yield f"{name} cannot be loaded: {' '.join(str(error).split())}"
        return
    encoder = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}.get(component, "")
    if encoder in configs:
        config = configs[encoder].get("text_config", configs[encoder])
        size = config.get("vocab_size")
        if size is not None and len(loaded) > size:
            yield f"got {len(loaded)} tokens but expected at most the {size} of {encoder}"


def _faults_of_widths(configs: Mapping[str, dict[str, Any]]) -> Iterator[Fault]:
    """Yields where one component's output does not fit the next one's input."""

    def of(component: str, key: str) -> Any:
        return configs.get(component, {}).get(key)

    meetings = (
        ("projection_model", "text_encoder_dim", "text_encoder", "projection_dim"),
        ("projection_model", "text_encoder_1_dim", "text_encoder_2", "d_model"),
        ("projection_model", "text_encoder_1_dim", "text_encoder_2", "hidden_size"),
        ("projection_model", "langauge_model_dim", "language_model", "n_embd"),
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "out_channels", "vae", "latent_channels"),
    )
    for component, key, other, other_key in meetings:
        got, expected = of(component, key), of(other, other_key)
        if None not in (got, expected) and got != expected:
            yield Fault(component, f"{key}: got {got!r} but expected {expected!r}, the {other_key} of {other}")


def _faults_of_speech(index: Mapping[str, Any], configs: Mapping[str, dict[str, Any]]) -> Iterator[Fault]:
    """Yields where the second text encoder and the components around it do not belong together."""
    if "text_encoder_2" not in configs or "tokenizer_2" not in configs:
        return
    encoder, tokenizer = index["text_encoder_2"][1], index["tokenizer_2"][1]
    expected = _SECOND_TOKENIZERS[encoder]
    if not tokenizer.startswith(expected):
        yield Fault("tokenizer_2", f"got the class {tokenizer!r} in {MODEL_INDEX} but expected {expected!r}")
    if encoder != SPEECH_ENCODER:
        return
    vocabulary = configs["text_encoder_2"].get("vocab_size", END_TOKEN + 1)
    if vocabulary <= END_TOKEN:
        yield Fault("text_encoder_2", f"vocab_size: got {vocabulary} but expected more than {END_TOKEN}")
    projection, length = configs.get("projection_model", {}), configs["tokenizer_2"].get("model_max_length")
    positions = projection.get("max_seq_length")
    has_length = isinstance(length, int) and length <= MAX_TOKENIZER_LENGTH
    if projection.get("use_learned_position_embedding") is not None and has_length and positions != length:
        message = f"max_seq_length: got {positions} but expected {length}, the model_max_length of tokenizer_2"
        yield Fault("projection_model", message)


def _read_json(path: Path) -> dict[str, Any] | str:
    """Returns the object in a JSON file, or a description of what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read: {error}"
    if not isinstance(content, dict):
        return f"{path.name}: got {type(content).__name__} but expected an object"
    return content


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:_FAULTS_SHOWN])
    return shown if len(keys) <= _FAULTS_SHOWN else f"{shown} and {len(keys) - _FAULTS_SHOWN} more"

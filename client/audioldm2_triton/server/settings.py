"""The settings of a server: the checkpoint, the device, the dtype, the limits and so on.

Each setting is a parameter in the models' `config.pbtxt`. The environment variable of the same name, in capitals and
with the prefix `AUDIOLDM2_`, overrides it for all models at once.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from audioldm2_triton.contract import Limits

if TYPE_CHECKING:
    import torch

ENVIRONMENT_PREFIX: Final = "AUDIOLDM2_"
DEVICES: Final = "auto, cpu, cuda or cuda:INDEX"
DTYPES: Final = ("auto", "float32", "float16", "bfloat16")
COMPILE: Final = ("auto", "on", "graphs", "off")
SWITCH: Final = ("off", "on")
LOG_FORMATS: Final = ("text", "json")
ARRIVAL: Final = "arrival"
LAXITY: Final = "laxity"
TIMESTEP_SPACINGS: Final = ("leading", "linspace", "trailing", "karras", "exponential", "lu_lambdas")


class SettingsError(ValueError):
    """A setting has a value that the server cannot start with."""


def _setting(default: Any, help: str, choices: Sequence[str] = (), range: tuple[float, float] | None = None) -> Any:
    """Declares a setting.

    Args:
        help: what it does and what its default means, for whoever starts a server.
        choices: the values that it may have, besides its default.
        range: the lowest and the highest number that it may be.
    """
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "range": range})


@dataclass(frozen=True)
class Settings:
    """The settings of a server; every field is a parameter of the same name."""

    checkpoint: str = _setting(
        MISSING,
        "a directory in the layout of `AudioLDM2Pipeline.save_pretrained`; for scripts/serve also a hub id "
        "such as cvssp/audioldm2, which is fetched first",
    )
    device: str = _setting("auto", f"{DEVICES} (default: auto: all GPUs, or the CPU if there are none)")
    dtype: str = _setting(
        "auto", "auto, float32, float16 or bfloat16 (default: auto: float16 on a GPU, float32 on a CPU)", DTYPES
    )
    max_audio_length_in_s: float = _setting(300.0, "the longest audio accepted (default: 300)", range=(0.1, 3600))
    max_num_inference_steps: int = _setting(200, "the most steps accepted (default: 200)", range=(1, 1000))
    max_num_waveforms_per_prompt: int = _setting(
        8, "the most waveforms per prompt accepted (default: 8)", range=(1, 64)
    )
    max_active_rows: int = _setting(
        0, "UNet batch items in flight in one engine (default: 0: derived from the device)", range=(0, 4096)
    )
    max_waiting: int = _setting(
        0, "requests that may wait for room in one engine (default: 0: derived from the device)", range=(0, 1_000_000)
    )
    scheduling: str = _setting(
        LAXITY,
        "laxity: interactive before batch, and first whose objective of three times its time alone comes soonest; "
        "others pause; arrival: requests enter in order of arrival and step until they are done (default: laxity)",
        (LAXITY, ARRIVAL),
    )
    compile: str = _setting(
        "auto",
        "on: torch.compile, and CUDA graphs on a GPU; graphs: CUDA graphs only; off: neither "
        "(default: auto: graphs on a GPU, off on a CPU)",
        COMPILE,
    )
    compile_lengths_in_s: str = _setting(
        "", "audio lengths to compile for, such as 2.56,10.24 (default: the checkpoint's native length)"
    )
    compile_max_rows: int = _setting(
        0, "UNet batch items of the largest compiled forward (default: 0: derived from the device)", range=(0, 4096)
    )
    embedding_cache_size: int = _setting(
        1024, "number of texts whose encoding is kept (default: 1024)", range=(0, 1_000_000)
    )
    max_new_tokens: int = _setting(
        0,
        "hidden states that GPT-2 generates for a text (default: 0: 512 for a checkpoint that speaks, "
        "else as in the checkpoint)",
        range=(0, 1024),
    )
    guidance_interval: str = _setting(
        "0,1", "lossy: guidance only between these shares of the steps, such as 0,0.7 (default: 0,1: always)"
    )
    timestep_spacing: str = _setting(
        "",
        f"lossy: how timesteps are spaced: {', '.join(TIMESTEP_SPACINGS[:-1])} or {TIMESTEP_SPACINGS[-1]} "
        "(default: as in the checkpoint)",
        TIMESTEP_SPACINGS,
    )
    full_negative_prompt: str = _setting(
        "off",
        "on: T5 reads the whole negative prompt; off: cut to the prompt's number of tokens, as in the reference "
        "(default: off)",
        SWITCH,
    )
    offload: str = _setting(
        "off", "on: a stage's weights are on the device only while it works, one stage at a time (default: off)", SWITCH
    )
    default_timeout_in_s: float = _setting(
        3600.0,
        "seconds after which a request without a timeout is given up; 0: never (default: 3600)",
        range=(0, 1_000_000),
    )
    log_format: str = _setting("text", "text or json, of the models' own log (default: text)", LOG_FORMATS)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_audio_length_in_s, self.max_num_inference_steps, self.max_num_waveforms_per_prompt)

    @property
    def guided_steps(self) -> tuple[float, float]:
        """`guidance_interval` as numbers."""
        first, last = (float(share) for share in self.guidance_interval.split(","))
        return first, last

    def lengths_to_compile(self, native_audio_length_in_s: float) -> tuple[float, ...]:
        """Returns seconds of audio, the shortest first."""
        if not self.compile_lengths_in_s:
            return (native_audio_length_in_s,)
        return tuple(sorted({float(length) for length in self.compile_lengths_in_s.split(",")}))


def environment_name(setting: str) -> str:
    return ENVIRONMENT_PREFIX + setting.upper()


def misspelt_variables(environ: Mapping[str, str], others: Collection[str]) -> dict[str, list[str]]:
    """Returns the variables that look like a setting's but are none, each with the settings that it resembles.

    Args:
        others: variables with another meaning.
    """
    settings = [each.name for each in fields(Settings)]
    known = {*map(environment_name, settings), *others}
    unknown = sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    resembled = {
        name: get_close_matches(name.removeprefix(ENVIRONMENT_PREFIX).lower(), settings, 1) for name in unknown
    }
    return {name: [environment_name(setting) for setting in found] for name, found in resembled.items()}


def read_settings(parameters: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Settings:
    """Reads a model's parameters, overridden by the environment; an empty value counts as not given.

    Raises `SettingsError`, which names the setting, what was given and what is accepted.
    """
    values = {
        each.name: _parse(each, given) for each in fields(Settings) if (given := _given(each.name, parameters, environ))
    }
    if "checkpoint" not in values:
        raise SettingsError(f"checkpoint: set the parameter or {environment_name('checkpoint')} to a directory")
    settings = Settings(**values)
    if settings.offload == "on" and settings.compile in ("on", "graphs"):
        raise SettingsError(
            f"compile: got {settings.compile!r} with offload but expected auto or off: graphs need weights in place"
        )
    _check_lengths(settings)
    _check_guidance_interval(settings)
    device, _, index = settings.device.partition(":")
    if device not in ("auto", "cpu", "cuda") or (index and (device != "cuda" or not index.isdigit())):
        raise SettingsError(f"device: got {settings.device!r} but expected {DEVICES}")
    return settings


def read_setting(name: str, parameters: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Any:
    """Reads one setting alone, as for a model without a checkpoint. Raises `SettingsError`."""
    setting = next(each for each in fields(Settings) if each.name == name)
    given = _given(name, parameters, environ)
    return _parse(setting, given) if given else setting.default


def _given(name: str, parameters: Mapping[str, str], environ: Mapping[str, str]) -> str:
    return environ.get(environment_name(name)) or parameters.get(name, "")


def _check_lengths(settings: Settings) -> None:
    try:
        valid = all(0.1 <= length <= settings.max_audio_length_in_s for length in settings.lengths_to_compile(0.1))
    except ValueError:
        valid = False
    if not valid:
        raise SettingsError(
            f"compile_lengths_in_s: got {settings.compile_lengths_in_s!r} but expected seconds from 0.1 to "
            f"{settings.max_audio_length_in_s:g}, separated by commas"
        )


def _check_guidance_interval(settings: Settings) -> None:
    try:
        first, last = settings.guided_steps
        valid = 0 <= first <= last <= 1
    except ValueError:
        valid = False
    if not valid:
        given = settings.guidance_interval
        raise SettingsError(f"guidance_interval: got {given!r} but expected two shares of the steps, such as 0,0.7")


def _parse(setting: "Field[Any]", given: str) -> Any:
    """Parses the text of one setting and checks it by itself. Raises `SettingsError`."""
    choices, span = setting.metadata["choices"], setting.metadata["range"]
    if choices and given not in choices:
        raise SettingsError(f"{setting.name}: got {given!r} but expected one of {', '.join(choices)}")
    if span is None:
        return given
    whole = setting.type is int
    try:
        value = int(given) if whole else float(given)
    except ValueError:
        value = float("nan")
    low, high = span
    if not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise SettingsError(f"{setting.name}: got {given!r} but expected {kind} from {low:g} to {high:g}")
    return value


def resolve_device(settings: Settings, instance_kind: str = "", instance_id: int = 0) -> "torch.device":
    """Returns the device of one model instance: the configured one, or the GPU that Triton assigned, or the CPU.

    Raises `SettingsError` if CUDA is configured but unavailable.
    """
    import torch

    if settings.device == "auto":
        if not torch.cuda.is_available() or instance_kind == "CPU":
            return torch.device("cpu")
        return torch.device("cuda", instance_id if instance_kind == "GPU" else 0)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"device: got {settings.device!r} but expected cpu: there is no CUDA device here")
    if settings.device == "cuda":
        return torch.device("cuda", instance_id if instance_kind == "GPU" else 0)
    return torch.device(settings.device)


def resolve_dtype(settings: Settings, device: "torch.device") -> "torch.dtype":
    """Returns the configured dtype, by default float16 on CUDA and float32 on a CPU.

    Raises `SettingsError` for float16 on a CPU.
    """
    import torch

    if settings.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if settings.dtype == "float16" and device.type == "cpu":
        raise SettingsError("dtype: got 'float16' on a CPU but expected float32 or bfloat16 (float16 needs a GPU)")
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def resolve_compile(settings: Settings, device: "torch.device") -> bool:
    """Returns whether a stage on this device prepares forwards of fixed shapes before it is ready.

    Never with offload, because CUDA graphs need weights that stay in place. Raises `SettingsError` for graphs without a
    GPU.
    """
    if settings.offload == "on":
        return False
    if settings.compile == "graphs" and device.type != "cuda":
        raise SettingsError(f"compile: got 'graphs' on {device} but expected auto, on or off: CUDA graphs need a GPU")
    return settings.compile in ("on", "graphs") or (settings.compile == "auto" and device.type == "cuda")


def checkpoint_name(path: str) -> str:
    """Returns the last two parts of its path: the hub id, if `scripts/serve` has fetched it."""
    return "/".join(Path(path).parts[-2:])


def resolved_settings(settings: Settings, device: "torch.device") -> dict[str, str]:
    """Returns what a stage on this device makes of the settings that it derives from the machine."""
    prepared = resolve_compile(settings, device)
    return {
        "checkpoint": checkpoint_name(settings.checkpoint),
        "device": str(device),
        "dtype": str(resolve_dtype(settings, device)).removeprefix("torch."),
        "compile": ("on" if uses_compiler(settings) else "graphs") if prepared else "off",
    }


def uses_compiler(settings: Settings) -> bool:
    """Whether the prepared forwards go through `torch.compile`; on a GPU they become CUDA graphs either way."""
    return settings.compile == "on"

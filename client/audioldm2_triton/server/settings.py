"""The settings of a server: the checkpoint, the device, the dtype, the limits and so on.

Each setting is a parameter in the models' `config.pbtxt`. The environment variable of the same name, in capitals and
with the prefix `AUDIOLDM2_`, overrides it for all models at once.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from audioldm2_triton.contract import Limits

if TYPE_CHECKING:
    import torch

ENVIRONMENT_PREFIX: Final = "AUDIOLDM2_"
DEVICES: Final = "auto, cpu, cuda or cuda:INDEX"
DTYPES: Final = ("auto", "float32", "float16", "bfloat16")
COMPILE: Final = ("auto", "on", "graphs", "off")
SWITCH: Final = ("on", "off")
OFFLOAD: Final = ("off", "on")
TIMESTEP_SPACINGS: Final = ("", "leading", "linspace", "trailing", "karras", "exponential", "lu_lambdas")


class SettingsError(ValueError):
    """A setting has a value that the server cannot start with."""


@dataclass(frozen=True)
class Settings:
    """The settings of a server; every field is a parameter of the same name."""

    checkpoint: str  # a local directory in the layout of `AudioLDM2Pipeline.save_pretrained`
    device: str = "auto"  # CUDA where there is a GPU, else CPU
    dtype: str = "auto"  # float16 on CUDA, float32 on a CPU
    max_audio_length_in_s: float = 300.0
    max_num_inference_steps: int = 200
    max_num_waveforms_per_prompt: int = 8
    max_active_rows: int = 0  # UNet batch items in flight in one engine; 0: derived from the device
    max_waiting: int = 0  # requests that may wait for room; 0: derived from the device
    compile: str = "auto"  # forwards of fixed shapes: torch.compile and CUDA graphs, graphs alone, or neither
    compile_cache: str = ""  # a directory in which compiled code outlives the server; empty: none
    compile_lengths_in_s: str = ""  # the audio lengths to compile for, as 2.56,10.24; empty: the native length
    compile_max_rows: int = 0  # UNet batch items of the largest compiled forward; 0: derived from the device
    embedding_cache_size: int = 1024  # texts whose encoding is kept; 0: none
    guidance_interval: str = "0,1"  # guidance begins and ends after these shares of the steps; 0,1: always on
    timestep_spacing: str = ""  # replaces the checkpoint's, for schedulers that support it; empty: the checkpoint's
    full_negative_prompt: str = "off"  # off: cut to the prompt's number of T5 tokens, as the reference does; on: whole
    offload: str = "off"  # whether a stage's weights are on the device only while it works
    default_timeout_in_s: float = 3600.0  # for requests that set none; 0: none

    @property
    def limits(self) -> Limits:
        return Limits(self.max_audio_length_in_s, self.max_num_inference_steps, self.max_num_waveforms_per_prompt)

    @property
    def guided_steps(self) -> tuple[float, float]:
        """`guidance_interval` as numbers."""
        first, last = (float(share) for share in self.guidance_interval.split(","))
        return first, last

    def lengths_to_compile(self, native_audio_length_in_s: float) -> tuple[float, ...]:
        """Seconds of audio, the shortest first."""
        if not self.compile_lengths_in_s:
            return (native_audio_length_in_s,)
        return tuple(sorted({float(length) for length in self.compile_lengths_in_s.split(",")}))


_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "max_audio_length_in_s": (0.1, 3600),
    "max_num_inference_steps": (1, 1000),
    "max_num_waveforms_per_prompt": (1, 64),
    "max_active_rows": (0, 4096),
    "max_waiting": (0, 1_000_000),
    "compile_max_rows": (0, 4096),
    "embedding_cache_size": (0, 1_000_000),
    "default_timeout_in_s": (0, 1_000_000),
}


def environment_name(setting: str) -> str:
    return ENVIRONMENT_PREFIX + setting.upper()


def read_settings(parameters: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from a model's parameters, overridden by the environment; an empty value counts as not given.

    Raises `SettingsError`, which names the setting, what was given and what is accepted.
    """
    values: dict[str, str | int | float] = {}
    for field in fields(Settings):
        given = _given(field.name, parameters, environ)
        if not given:
            continue
        if field.name in _RANGES:
            values[field.name] = _number(field.name, given, whole=field.type is int)
        else:
            values[field.name] = given
    if "checkpoint" not in values:
        raise SettingsError(f"checkpoint: set the parameter or {environment_name('checkpoint')} to a directory")
    settings = Settings(**values)  # type: ignore[arg-type]
    if settings.dtype not in DTYPES:
        raise SettingsError(f"dtype: got {settings.dtype!r} but expected one of {', '.join(DTYPES)}")
    if settings.compile not in COMPILE:
        raise SettingsError(f"compile: got {settings.compile!r} but expected one of {', '.join(COMPILE)}")
    if settings.full_negative_prompt not in SWITCH:
        given = settings.full_negative_prompt
        raise SettingsError(f"full_negative_prompt: got {given!r} but expected one of {', '.join(SWITCH)}")
    if settings.offload not in OFFLOAD:
        raise SettingsError(f"offload: got {settings.offload!r} but expected one of {', '.join(OFFLOAD)}")
    if settings.offload == "on" and settings.compile in ("on", "graphs"):
        raise SettingsError(
            f"compile: got {settings.compile!r} with offload but expected auto or off: graphs need weights in place"
        )
    if settings.timestep_spacing not in TIMESTEP_SPACINGS:
        expected = ", ".join(TIMESTEP_SPACINGS[1:])
        raise SettingsError(f"timestep_spacing: got {settings.timestep_spacing!r} but expected one of {expected}")
    _check_lengths(settings)
    _check_guidance_interval(settings)
    device, _, index = settings.device.partition(":")
    if device not in ("auto", "cpu", "cuda") or (index and (device != "cuda" or not index.isdigit())):
        raise SettingsError(f"device: got {settings.device!r} but expected {DEVICES}")
    if device == "cpu" and settings.dtype == "float16":
        raise SettingsError("dtype: got 'float16' on a CPU but expected float32 or bfloat16 (float16 needs a GPU)")
    return settings


def read_default_timeout(parameters: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> float:
    """`default_timeout_in_s` alone, for a model that has no checkpoint. Raises `SettingsError`."""
    name = "default_timeout_in_s"
    given = _given(name, parameters, environ)
    return _number(name, given, whole=False) if given else Settings.default_timeout_in_s


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


def _number(name: str, given: str, whole: bool) -> int | float:
    low, high = _RANGES[name]
    try:
        value = int(given) if whole else float(given)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise SettingsError(f"{name}: got {given!r} but expected {kind} from {low:g} to {high:g}")
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
    """Whether a stage on this device prepares forwards of fixed shapes before it is ready.

    Never with offload, because CUDA graphs need weights that stay in place. Raises `SettingsError` for graphs without a
    GPU.
    """
    if settings.offload == "on":
        return False
    if settings.compile == "graphs" and device.type != "cuda":
        raise SettingsError(f"compile: got 'graphs' on {device} but expected auto, on or off: CUDA graphs need a GPU")
    return settings.compile in ("on", "graphs") or (settings.compile == "auto" and device.type == "cuda")


def uses_compiler(settings: Settings) -> bool:
    """Whether the prepared forwards go through `torch.compile`; on a GPU they become CUDA graphs either way."""
    return settings.compile == "on"

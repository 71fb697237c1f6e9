"""Writes the model repository that one server runs: the same models, with the resolved settings as parameters.

Triton does not expand the environment in `config.pbtxt`, and a client can read only what is written there. So the
settings, resolved from the command line and the environment, are written into a copy of each configuration; the version
folders are links.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from audioldm2_triton.contract import ENSEMBLE, SCHEDULERS, STREAM
from audioldm2_triton.server.clipping import clipping_schedulers
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.settings import Settings, checkpoint_name
from audioldm2_triton.server.speech import speaks
from serving.plain_paths import plain_path

FRONTS = (ENSEMBLE, STREAM)


def write_repository(
    source: Path, target: Path, settings: Settings, prefix: str = "", models: Sequence[str] = (ENSEMBLE,)
) -> None:
    """Makes `target` a model repository that runs the models of `source` with `settings`.

    With a prefix, all models and the references between them are renamed, so that several checkpoints can be in one
    repository. A link that the models may need is made beside `target`.

    Args:
        models: what clients can call for audio on this server, for them to read.
    """
    plain = replace(settings, checkpoint=str(plain_path(Path(settings.checkpoint), target.parent)))
    parameters = {name: _text(value) for name, value in asdict(plain).items()}
    public = {**parameters, **_public_parameters(settings), "models": ",".join(models), "stage_prefix": prefix}
    for config_path in sorted(source.glob("*/config.pbtxt")):
        model = config_path.parent
        config = text_format.Parse(config_path.read_text(), model_config_pb2.ModelConfig())
        # Only the parameters that the model declares.
        for name in config.parameters:
            config.parameters[name].string_value = (public if model.name in FRONTS else parameters).get(
                name, config.parameters[name].string_value
            )
        for step in config.ensemble_scheduling.step:
            step.model_name = prefix + step.model_name
        _place(config, settings.device)
        copy = target / (prefix + model.name)
        copy.mkdir(parents=True)
        (copy / "config.pbtxt").write_text(text_format.MessageToString(config))
        for version in model.iterdir():
            if version.name.isdigit():
                (copy / version.name).symlink_to(version.resolve(), target_is_directory=True)


def _public_parameters(settings: Settings) -> dict[str, str]:
    """Returns what clients can read about the checkpoint."""
    checkpoint = Path(settings.checkpoint)
    geometry, clipping = read_audio_geometry(checkpoint), clipping_schedulers(checkpoint)
    return {
        "checkpoint": checkpoint_name(settings.checkpoint),
        "native_audio_length_in_s": _text(geometry.native_audio_length_in_s),
        "sampling_rate": _text(geometry.sampling_rate),
        "schedulers": ",".join(name for name in SCHEDULERS if name not in clipping),
        "transcription": "required" if speaks(checkpoint) else "refused",
    }


def _place(config: Any, device: str) -> None:
    """Keeps instances of automatic kind off all devices except the configured one."""
    for group in config.instance_group:
        if group.kind != group.KIND_AUTO:
            continue
        if device == "cpu":
            group.kind = group.KIND_CPU
        elif ":" in device:
            group.kind = group.KIND_GPU
            group.gpus.append(int(device.partition(":")[2]))


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

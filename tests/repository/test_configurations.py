"""The five `config.pbtxt`, the contract, the settings and what the stages read: each is checked against the others."""

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from audioldm2_triton import contract
from audioldm2_triton.server import stage_tensors
from audioldm2_triton.server.settings import Settings, read_settings
from project import ROOT
from serving.repository import write_repository

STAGES: Final = ("text_conditioning", "denoiser", "decoder")
FRONTS: Final = ("audioldm2", "audioldm2_stream")
TYPES: Final = {"TYPE_STRING": "BYTES"}


def read(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


CONFIGURATIONS: Final = {model: read(ROOT / "model_repository" / model) for model in (*STAGES, *FRONTS)}


def tensors(given: Any) -> dict[str, str]:
    names = model_config_pb2.DataType.Name
    found = {each.name: names(each.data_type) for each in given}
    return {name: TYPES.get(kind, kind.removeprefix("TYPE_")) for name, kind in found.items()}


def steps() -> dict[str, Any]:
    return {step.model_name: step for step in CONFIGURATIONS["audioldm2"].ensemble_scheduling.step}


@pytest.mark.parametrize("model", ["text_conditioning", *FRONTS])
def test_public_inputs_are_the_contracts(model: str) -> None:
    config = CONFIGURATIONS[model]
    assert tensors(config.input) == contract.INPUTS
    assert [each.name for each in config.input if not each.optional] == ["prompt"]
    assert all(list(each.dims) == [1] for each in config.input)


def test_public_outputs_are_the_contracts() -> None:
    assert tensors(CONFIGURATIONS["audioldm2"].output) == contract.OUTPUTS
    stream = tensors(CONFIGURATIONS["audioldm2_stream"].output)
    assert {name: stream[name] for name in contract.OUTPUTS} == contract.OUTPUTS


def test_the_ensemble_passes_on_what_the_stages_declare() -> None:
    made = tensors(CONFIGURATIONS["audioldm2"].input)
    for model, step in steps().items():
        inputs, outputs = tensors(CONFIGURATIONS[model].input), tensors(CONFIGURATIONS[model].output)
        for own, name in step.input_map.items():
            assert made[name] == inputs[own], f"{model}: {own}"
        made |= {name: outputs[own] for own, name in step.output_map.items()}
    assert {name: made[name] for name in contract.OUTPUTS} == contract.OUTPUTS
    assert set(steps()["text_conditioning"].input_map) == set(contract.INPUTS)
    assert set(steps()["text_conditioning"].output_map) == set(tensors(CONFIGURATIONS["text_conditioning"].output))


def test_both_fronts_send_the_stages_the_same() -> None:
    assert set(steps()["denoiser"].input_map) == set(stage_tensors.DENOISED)
    assert set(steps()["decoder"].input_map) == {
        *stage_tensors.DECODED[stage_tensors.WHOLE],
        *stage_tensors.DECODED_TOO,
    }


def test_the_stages_read_what_they_declare() -> None:
    parsed = (*stage_tensors.TEXT, *stage_tensors.NEGATIVE_TEXT, *stage_tensors.COLUMNS)
    assert set(tensors(CONFIGURATIONS["denoiser"].input)) == {*parsed, *stage_tensors.OPTIONAL}
    of_parts = {name for names in stage_tensors.DECODED.values() for name in names}
    assert set(tensors(CONFIGURATIONS["decoder"].input)) == {*of_parts, *stage_tensors.DECODED_TOO}


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_reaches_every_stage(stage: str) -> None:
    """Which settings are checked together is nothing that a stage's configuration should have to know."""
    parameters = CONFIGURATIONS[stage].parameters
    assert set(parameters) == {field.name for field in fields(Settings)}
    assert not any(parameter.string_value for parameter in parameters.values()), "defaults stand in settings.py alone"


def test_what_serve_accepts_all_stages_accept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = {
        "checkpoint": str(tiny_checkpoint),
        "max_audio_length_in_s": "600",
        "compile_lengths_in_s": "400",
        "max_num_inference_steps": "1000",
        "default_timeout_in_s": "0",
    }
    settings = read_settings(given, {})
    write_repository(ROOT / "model_repository", tmp_path, settings)
    for stage in STAGES:
        parameters = read(tmp_path / stage).parameters
        assert read_settings({name: value.string_value for name, value in parameters.items()}, {}) == settings


def test_modules_of_all_models_have_names_of_their_own() -> None:
    """Several models can be loaded into one process, as the tests do."""
    names = Counter(
        path.stem
        for path in ROOT.glob("model_repository/*/1/*")
        if path.suffix == ".py" or (path / "__init__.py").exists()
    )
    assert {name for name, count in names.items() if count > 1} == {"model"}


@pytest.mark.parametrize("model", [*STAGES, *FRONTS])
def test_texts_are_not_batched_by_triton(model: str) -> None:
    """One whose length is a lie would fail the whole batch, before the model sees it."""
    config = CONFIGURATIONS[model]
    assert "BYTES" not in tensors(config.input).values() or not config.HasField("dynamic_batching")

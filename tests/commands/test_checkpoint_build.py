"""A checkpoint of random weights is deterministic, loads as a pipeline, is audible and reacts to every argument."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from checkpoints.__main__ import main
from checkpoints.building import build
from checkpoints.layout import CLASSES, CONFIG_FILES, WEIGHTS
from checkpoints.shapes import SIZES, SPEAKING, component_config
from checkpoints.vocabularies import SENTENCES

LENGTH = 0.2  # s


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> AudioLDM2Pipeline:
    pipeline = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: AudioLDM2Pipeline,
    prompt: str = "a dog barks",
    negative_prompt: str = "",
    guidance_scale: float = 3.5,
    num_inference_steps: int = 20,
    seed: int = 0,
) -> np.ndarray:
    return pipeline(
        prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        audio_length_in_s=LENGTH,
        generator=torch.Generator().manual_seed(seed),
    ).audios[0]


@pytest.fixture(scope="module")
def plain(pipeline: AudioLDM2Pipeline) -> np.ndarray:
    return generate(pipeline)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{component}/{key}": tensor
        for component, stem in WEIGHTS.items()
        for key, tensor in load_file(checkpoint / component / f"{stem}.safetensors").items()
    }


def test_seed_decides_every_weight(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        build("tiny", tmp_path / name, seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    same = [key for key in a if torch.equal(a[key], c[key])]
    # Constants: what is counted and indexed, the scales, and the variance that noise stays below.
    constants = ("_ids", "_index", "tracked", "mean", "scale", "logit_scale_a", "logit_scale_t", "running_var")
    assert [key for key in same if not key.endswith(constants)] == []


def test_build_leaves_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["build", "tiny", "--out", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_only_safetensors_and_small(tiny_checkpoint: Path) -> None:
    files = [path for path in tiny_checkpoint.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 12e6


@pytest.mark.parametrize("size", SIZES)
def test_configs_keep_the_topology_of_the_reference(size: str) -> None:
    for component in CLASSES:
        if component.startswith("tokenizer"):
            continue
        config, reference = component_config(size, component), component_config("base", component)
        if size not in SPEAKING or component not in ("text_encoder_2", "projection_model"):
            assert config.keys() == reference.keys()
        if component in ("scheduler", "feature_extractor"):
            assert config == reference
    unet = component_config(size, "unet")
    assert len(unet["block_out_channels"]) == len(unet["cross_attention_dim"]) == 4
    assert unet["layers_per_block"] == (1 if size in ("tiny", "tiny-speech") else 2)
    assert unet["sample_size"] == 256
    assert component_config(size, "vocoder")["upsample_rates"] == [5, 4, 2, 2, 2]


def test_large_is_deeper_than_base() -> None:
    base, large = component_config("base", "unet"), component_config("large", "unet")
    assert (base["transformer_layers_per_block"], large["transformer_layers_per_block"]) == (1, 2)
    assert large["cross_attention_dim"] == [[None, 768, 1024, None]] * 4 != base["cross_attention_dim"]


def test_configs_are_written_as_they_are_on_the_hub(tiny_checkpoint: Path) -> None:
    for component, file in CONFIG_FILES.items():
        if not component.startswith("tokenizer"):
            assert json.loads((tiny_checkpoint / component / file).read_text()) == component_config("tiny", component)


def test_tokenizers_have_the_ids_of_the_originals(pipeline: AudioLDM2Pipeline) -> None:
    roberta, t5 = pipeline.tokenizer, pipeline.tokenizer_2
    assert (roberta.bos_token_id, roberta.pad_token_id, roberta.eos_token_id, roberta.unk_token_id) == (0, 1, 2, 3)
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert (roberta.model_max_length, t5.model_max_length) == (512, 128)
    assert roberta("").input_ids == [0, 2]
    assert t5("").input_ids == [1]
    for text in (*SENTENCES, "zebra 42!", "Übergröße, 音楽"):
        assert roberta.decode(roberta(text).input_ids, skip_special_tokens=True) == text
        assert t5(text).input_ids[-1] == 1
    assert t5.unk_token_id not in t5("Quick! (zebra) ~42?").input_ids
    assert len(t5("a " * 600, truncation=True, max_length=t5.model_max_length).input_ids) == 128


def test_waveform_is_audible_and_not_clipped(plain: np.ndarray) -> None:
    assert 0.05 < np.abs(plain).max() < 0.8
    assert plain.std() > 0.005


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a dog barked"},
        {"prompt": "rain"},
        {"negative_prompt": "low quality"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        {"num_inference_steps": 21},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_argument_is_heard(pipeline: AudioLDM2Pipeline, plain: np.ndarray, change: dict[str, object]) -> None:
    changed = generate(pipeline, **change)  # type: ignore[arg-type]
    assert np.abs(changed - plain).max() > 1e-2 * np.abs(plain).max()


def test_strong_guidance_does_not_blow_up(pipeline: AudioLDM2Pipeline) -> None:
    arguments = {"guidance_scale": 12.0, "num_inference_steps": 50, "audio_length_in_s": 0.1, "output_type": "latent"}
    latents = pipeline("a dog barks", generator=torch.Generator().manual_seed(0), **arguments).audios
    assert torch.isfinite(latents).all()
    assert 0.1 < latents.std() < 30


def test_both_text_branches_matter(pipeline: AudioLDM2Pipeline) -> None:
    def states(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, _, generated = pipeline.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        return embeds, generated

    (t5, gpt2), (other_t5, other_gpt2) = states("a dog barks"), states("a dog sings")
    assert t5.shape == (1, 4, 48)
    assert gpt2.shape == (1, 8, 32)
    assert (gpt2 - other_gpt2).std() > 0.1 * gpt2.std()
    assert (t5[:, 0] - other_t5[:, 0]).std() > 0.01 * t5.std()  # the same token in another sentence
    assert (gpt2[0, 0] - gpt2[0, 7]).std() > 0.1 * gpt2.std()  # no fixed point


def test_clap_tells_candidates_apart(pipeline: AudioLDM2Pipeline, plain: np.ndarray) -> None:
    waveforms = [plain, *(generate(pipeline, seed=seed) for seed in (1, 2))]
    # Nearest neighbours are enough here: 16 to 48 kHz.
    clips = [np.repeat(waveform, 3) for waveform in waveforms]
    features = pipeline.feature_extractor(clips, sampling_rate=48000, return_tensors="pt").input_features
    tokens = pipeline.tokenizer(["a dog barks", "rain on a roof"], padding=True, return_tensors="pt")
    with torch.no_grad():
        audio = pipeline.text_encoder.get_audio_features(features).pooler_output
        text = pipeline.text_encoder.get_text_features(**tokens).pooler_output
    similarity = torch.nn.functional.normalize(text, dim=-1) @ torch.nn.functional.normalize(audio, dim=-1).T
    spread = similarity.amax(1) - similarity.amin(1)
    assert (spread > 1e-3).all()
    assert (similarity[0] - similarity[1]).abs().max() > 1e-2

"""The page on the stages by themselves: its example as it stands, equal to the reference with the same tensors."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from audioldm2_pipeline import Reference, difference, tolerance
from audioldm2_triton.contract import DEFAULT_SCHEDULER
from multi_diffusion import multi_diffusion
from plain_requests import on_test_ports
from project import ROOT
from serving.local_server import LocalServer
from stepping.request import DenoisingRow, TextStates

PAGE = (ROOT / "model_repository/STAGES.md").read_text()
EMBEDDINGS = (
    *("prompt_embeds", "attention_mask", "generated_prompt_embeds"),
    *("negative_prompt_embeds", "negative_attention_mask", "negative_generated_prompt_embeds"),
)


@pytest.fixture(scope="module")
def example(server: LocalServer) -> dict[str, Any]:
    """What the page's code leaves behind, with what it printed."""
    printed: list[tuple[Any, ...]] = []
    names: dict[str, Any] = {"print": lambda *values: printed.append(values)}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(on_test_ports(code, server), "STAGES.md", "exec"), names)
    return {**names, "printed": printed}


def solver(pipe: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)


def as_given(pipe: Any, array: np.ndarray) -> torch.Tensor:
    """A caller's floats in the pipeline's dtype."""
    tensor = torch.from_numpy(array.copy())
    return tensor.to(pipe.dtype) if tensor.is_floating_point() else tensor


@torch.no_grad()
def reference_latents(pipe: Any, tensors: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
    """A pipeline's latents [N, 8, H, 16] for embeddings and noise of the caller's own."""
    pipe.scheduler = solver(pipe)
    latents: torch.Tensor = pipe(
        **{name: as_given(pipe, tensors[name]) for name in EMBEDDINGS},
        latents=as_given(pipe, noise[0]),
        audio_length_in_s=2.0,
        num_inference_steps=10,
        guidance_scale=3.5,
        output_type="latent",
    ).audios
    return latents.numpy()


@torch.no_grad()
def decoded(pipe: Any, latents: np.ndarray, samples: int) -> np.ndarray:
    """The VAE's and the vocoder's audio [N, S] of latents [N, 8, H, 16]."""
    mel = pipe.vae.decode(as_given(pipe, latents) / pipe.vae.config.scaling_factor).sample
    audio: np.ndarray = pipe.mel_spectrogram_to_waveform(mel)[:, :samples].numpy()
    return audio


def both(reference: Reference, compute: Callable[..., np.ndarray], *arguments: Any) -> tuple[np.ndarray, float]:
    """What the pipeline in float32 computes, and how far another computation in float32 may be from it."""
    single, double = (compute(pipe, *arguments) for pipe in (reference.pipeline, reference.double))
    return single, tolerance(single, double)


def test_mixed_prompts_with_own_noise_are_the_references(example: dict[str, Any], reference: Reference) -> None:
    expected, bound = both(reference, reference_latents, example["mixed"], example["noise"])
    assert difference(example["latents"][0], expected) <= bound
    unmixed = {**example["mixed"], **{name: example["texts"][name][:1] for name in example["TEXT"]}}
    assert difference(reference_latents(reference.pipeline, unmixed, example["noise"]), expected) > 1e-2


def test_own_latents_are_decoded_as_by_vae_and_vocoder(example: dict[str, Any], reference: Reference) -> None:
    assert example["printed"] == [((1, 1, 32000), 16000)]
    expected, bound = both(reference, decoded, example["turned"][0], 32000)
    assert difference(example["answer"]["audio"][0], expected) <= bound
    # Nothing of the denoiser's making, two waveforms, fewer samples than there are.
    own = np.random.default_rng(1).standard_normal((1, 2, 8, 30, 16), dtype=np.float32)
    decoding = {**example["decoding"], "num_samples": np.array([[17000]], np.int32)}
    answer = example["call"]("decoder", {"latents": own, **decoding}, ["audio"])
    expected, bound = both(reference, decoded, own[0], 17000)
    assert difference(answer["audio"][0], expected) <= bound


def test_the_noise_of_a_seed_is_the_seed(example: dict[str, Any], reference: Reference) -> None:
    drawn = torch.randn((1, 1, 8, 50, 16), generator=torch.Generator("cpu").manual_seed(7)).numpy()
    mixed = example["mixed"]
    by_noise = example["call"]("denoiser", {**mixed, "noise": drawn}, ["latents"])["latents"]
    by_seed = example["call"]("denoiser", {**mixed, "seed": np.array([[7]])}, ["latents"])["latents"]
    _, bound = both(reference, reference_latents, mixed, drawn)
    assert difference(by_noise, by_seed) <= bound


def windowed_latents(pipe: Any, tensors: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
    """A pipeline's latents [N, 8, H, 16] in windows of 24 frames that overlap by 5."""
    texts = [
        TextStates(*(as_given(pipe, tensors[prefix + name][0]) for name in EMBEDDINGS[:3]))
        for prefix in ("", "negative_")
    ]
    row = DenoisingRow(*texts, 3.5, 10, DEFAULT_SCHEDULER, as_given(pipe, noise[0]))
    return multi_diffusion(pipe.unet, solver(pipe), row, 24, 5).numpy()


def test_a_request_in_windows_at_the_stage(example: dict[str, Any], reference: Reference) -> None:
    mixed, noise = example["mixed"], example["noise"]
    windows = {"window_frames": np.array([[24]], np.int32), "overlap_frames": np.array([[5]], np.int32)}
    latents = example["call"]("denoiser", {**mixed, **windows, "noise": noise}, ["latents"])["latents"]
    expected, bound = both(reference, windowed_latents, mixed, noise)
    assert difference(latents[0], expected) <= bound


REFUSED = [
    ("noise", np.zeros((1, 1, 8, 49, 16), np.float32), r"[1, 1, 8, 49, 16]", "[1, 1, 8, 50, 16]"),
    ("noise", np.zeros((1, 2, 8, 50, 16), np.float32), r"[1, 2, 8, 50, 16]", "[1, 1, 8, 50, 16]"),
    ("noise", np.full((1, 1, 8, 50, 16), np.nan, np.float32), "nan", "finite"),
    ("prompt_embeds", np.zeros((1, 9, 7), np.float32), "[1, 9, 7]", "[1, any, 48]"),
    ("generated_prompt_embeds", np.zeros((1, 7, 32), np.float32), "[1, 7, 32]", "[1, 8, 32]"),
    ("generated_prompt_embeds", np.full((1, 8, 32), np.inf, np.float32), "inf", "finite"),
    ("attention_mask", np.ones((1, 3), np.int32), "[1, 3]", "[1, "),
    ("scheduler", np.array([["AutoencoderKL"]], object), "'AutoencoderKL'", "DPMSolverMultistepScheduler"),
    ("noise", np.full((1, 1, 8, 50, 16), 1e5, np.float32), "100000.0", "at most 10000"),
    ("num_inference_steps", np.array([[0]], np.int32), "0", "from 1 to 200"),
    ("num_inference_steps", np.array([[2**31 - 1]], np.int32), "2147483647", "from 1 to 200"),
    ("latent_frames", np.array([[0]], np.int32), "0", "from 1 to 7500"),
    ("latent_frames", np.array([[2**31 - 1]], np.int32), "2147483647", "from 1 to 7500"),
    ("num_waveforms_per_prompt", np.array([[9]], np.int32), "9", "from 1 to 8"),
    ("guidance_scale", np.array([[50.5]], np.float32), "50.5", "from 0 to 50"),
    ("seed", np.array([[-1]]), "-1", "from 0 to"),
    ("window_frames", np.array([[-8]], np.int32), "-8", "0, or"),
    ("overlap_frames", np.array([[13]], np.int32), "13", "from 0 to half of the window, 12"),
]


@pytest.mark.parametrize(("name", "value", "got", "accepted"), REFUSED, ids=lambda value: str(value)[:12])
def test_what_does_not_fit_is_refused_by_name(
    name: str, value: np.ndarray, got: str, accepted: str, example: dict[str, Any]
) -> None:
    windows = {"window_frames": np.array([[24]], np.int32), "overlap_frames": np.array([[8]], np.int32)}
    given = {**example["mixed"], **windows, "seed": np.array([[7]])}
    with pytest.raises(InferenceServerException) as caught:
        example["call"]("denoiser", {**given, name: value}, ["latents"])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert f"`{name}`: got {got}" in caught.value.message()
    assert accepted in caught.value.message().partition("but expected")[2]


@pytest.mark.parametrize(
    ("name", "value", "got", "accepted"),
    [
        ("latents", np.zeros((1, 1, 7, 50, 16), np.float32), "[1, 1, 7, 50, 16]", "[1, any, 8, any, 16]"),
        ("latents", np.zeros((1, 0, 8, 50, 16), np.float32), "[1, 0, 8, 50, 16]", "[1, any, 8, any, 16]"),
        ("latents", np.full((1, 1, 8, 50, 16), 1e38, np.float32), "9.99", "at most 10000"),
        ("num_samples", np.array([[0]], np.int32), "0", "from 1"),
        ("num_samples", np.array([[2**31 - 1]], np.int32), "2147483647", "at most"),
        ("text_embeds", np.zeros((1, 512), np.float32), "[1, 512]", "[1, 40]"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_does_not_decode_is_refused_by_name(
    name: str, value: np.ndarray, got: str, accepted: str, example: dict[str, Any]
) -> None:
    given = {"latents": example["turned"], **example["decoding"], name: value}
    with pytest.raises(InferenceServerException) as caught:
        example["call"]("decoder", given, ["audio"])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert f"`{name}`: got {got}" in caught.value.message()
    assert accepted in caught.value.message().partition("but expected")[2]


def test_a_request_for_progress_without_its_number_is_one_of_an_unknown_job(example: dict[str, Any]) -> None:
    """Triton passes the parameters of a request on to the steps of an ensemble, so anybody may send these."""
    inputs = [grpc.InferInput("deadline_ns", [1, 1], "INT64")]
    inputs[0].set_data_from_numpy(np.zeros((1, 1), np.int64))
    answer = example["client"].infer("denoiser", inputs, parameters={"ctl": "progress", "job": "nobody's"})
    assert answer.as_numpy("num_steps").tolist() == [[0]]
    with pytest.raises(InferenceServerException, match="`after`: got 'soon'") as caught:
        example["client"].infer("denoiser", inputs, parameters={"ctl": "progress", "job": "", "after": "soon"})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("missing", ["prompt_embeds", "negative_generated_prompt_embeds", "scheduler", "seed"])
def test_what_is_missing_is_named(missing: str, example: dict[str, Any]) -> None:
    given = {name: array for name, array in example["mixed"].items() if name != missing}
    if missing != "seed":
        given["seed"] = np.array([[7]])
    with pytest.raises(InferenceServerException) as caught:
        example["call"]("denoiser", given, ["latents"])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert f"`{missing}`: got None" in caught.value.message()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", PAGE))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "model_repository" / link).exists()

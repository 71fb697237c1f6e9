"""Windows through the server: the audio is MultiDiffusion's by hand, decoded."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from audioldm2_pipeline import Reference, difference, tolerance
from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.contract import DEFAULT_SCHEDULER
from denoising_inputs import draw_noise
from metrics_page import is_idle, wait_for_metrics
from multi_diffusion import multi_diffusion
from serving.local_server import LocalServer
from stepping.request import DenoisingRow, TextStates

PROMPT, LENGTH_IN_S, STEPS = "A hammer hits a wooden surface", 2.56, 5
FRAMES, WINDOW, OVERLAP = 64, 32, 16  # latent frames: three windows of 1.28 s


def by_hand(reference: Reference, pipe: Any) -> np.ndarray:
    """A pipeline's audio [N, S] of the request, two waveforms."""
    with torch.no_grad():
        embeds, mask, generated = pipe.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt="hiss")
        negative, positive = (TextStates(embeds[i], mask[i], generated[i]) for i in range(2))
        noise = draw_noise(11, (2, 8, FRAMES, 16)).to(pipe.dtype)
        row = DenoisingRow(positive, negative, 3.5, STEPS, DEFAULT_SCHEDULER, noise)
        solver = diffusers.DPMSolverMultistepScheduler.from_config(reference.scheduler_config)
        latents = multi_diffusion(pipe.unet, solver, row, WINDOW, OVERLAP)
        mel = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        audio: torch.Tensor = pipe.mel_spectrogram_to_waveform(mel)[:, : int(LENGTH_IN_S * 16000)]
    return audio.numpy()


@pytest.fixture(scope="module")
def expected_and_bound(reference: Reference) -> tuple[np.ndarray, float]:
    single, double = (by_hand(reference, pipe) for pipe in (reference.pipeline, reference.double))
    return single, tolerance(single, double)


@pytest.mark.parametrize("front", ["ensemble", "stream"])
def test_a_clip_in_three_windows(front: str, server: LocalServer, expected_and_bound: tuple[np.ndarray, float]) -> None:
    told: list[int] = []
    options = {
        "negative_prompt": "hiss",
        "audio_length_in_s": LENGTH_IN_S,
        "num_inference_steps": STEPS,
        "num_waveforms_per_prompt": 2,
        "seed": 11,
    }
    before = wait_for_metrics(server, is_idle, "an idle server")
    with AudioLDM2Client(server.grpc_url) as client:
        if front == "ensemble":
            windowed, whole = client.generate([PROMPT] * 2, window_length_in_s=[1.28, 0.0], **options)
        else:
            windowed = client.generate(
                PROMPT, window_length_in_s=1.28, on_progress=lambda progress: told.append(progress.step), **options
            )
            # A window as long as the clip is no window.
            whole = client.generate(PROMPT, window_length_in_s=LENGTH_IN_S, **options)
    expected, bound = expected_and_bound
    order = [min(range(2), key=lambda index: difference(windowed.audio[index], one)) for one in expected]
    assert sorted(order) == [0, 1]
    assert difference(windowed.audio[order], expected) <= bound
    assert min(difference(one, expected[0]) for one in whole.audio) > 1e-2
    assert told == ([] if front == "ensemble" else [1, 2, 3, 4, 5])
    after = wait_for_metrics(server, is_idle, "an idle server")
    forwards, rows = (
        after[name] - before[name] for name in ("audioldm2_rows_per_forward_count", "audioldm2_rows_per_forward_sum")
    )
    # Three windows of two waveforms with guidance, and two whole waveforms: all together, or in two forwards a step.
    assert rows == STEPS * (12 + 4)
    assert forwards <= 2 * STEPS

"""In float32 on a CPU, what is served is as near to the reference in float64 as the reference's own float32 is.

The error of one waveform is a random number, and so is the ratio of two errors: its logarithm has a standard deviation
of about a quarter. So the bound is for the geometric mean over several waveforms (see `Distances.ratio`), of at least
five seeds.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audioldm2_pipeline import Call, Reference, as_row
from audioldm2_triton.contract import SCHEDULERS
from audioldm2_triton.server.settings import Settings
from benchmarks.exactness import Distances, Precisions, latent_distances, stage_distances
from in_process.stages import Stages, running_stages
from stepping.denoising_unet import DenoisingUNet
from stepping.forward_plan import ALWAYS_MIX
from unet import lean_unet

BOUND = 1.5
CALL = Call("A dog barks twice while leaves rustle", "low quality", 0.64, num_waveforms_per_prompt=5, seed=11)
LENGTHS = (0.64, 1.0, 0.37, 0.2)


@pytest.fixture(scope="module")
def precisions(reference: Reference) -> Precisions:
    return Precisions(reference.pipeline, reference.double, dict(reference.scheduler_config))


@pytest.fixture(scope="module")
def stages(tiny_checkpoint: Path) -> Iterator[Stages]:
    """Whatever is in flight together shares its forwards, with masks where the lengths differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoisingUNet, "warm_up", lambda _: ALWAYS_MIX)
        with running_stages(Settings(str(tiny_checkpoint), device="cpu", dtype="float32")) as running:
            yield running


def pooled(found: list[Distances]) -> float:
    return sum(found, Distances()).ratio


def check_latents(precisions: Precisions, stages: Stages, calls: list[Call], together: bool = False) -> None:
    found = latent_distances(precisions, stages, [as_row(call) for call in calls], together)
    for call, one in zip(calls, found, strict=True):
        print(f"{call.scheduler}, {call.num_inference_steps} steps, guidance {call.guidance_scale}: {one.ratio:.2f}")
    assert pooled(found) <= BOUND


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_alone(scheduler: str, precisions: Precisions, stages: Stages) -> None:
    call = replace(CALL, scheduler=scheduler)
    grid = [(2, 3.5), (7, 3.5), (13, 1.0)]
    calls = [replace(call, num_inference_steps=steps, guidance_scale=guidance) for steps, guidance in grid]
    check_latents(precisions, stages, calls)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_after_many_steps(scheduler: str, precisions: Precisions, stages: Stages) -> None:
    call = replace(CALL, scheduler=scheduler, audio_length_in_s=0.37, guidance_scale=1.0)
    check_latents(precisions, stages, [replace(call, num_inference_steps=steps) for steps in (50, 200)])


def test_latents_in_a_crowd(precisions: Precisions, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[bool] = []
    forward = lean_unet.LeanUNet.forward

    def watched(self: Any, sample: Any, time_biases: Any, text: Any, masks: Any) -> Any:
        masked.append(masks is not None)
        return forward(self, sample, time_biases, text, masks)

    monkeypatch.setattr(lean_unet.LeanUNet, "forward", watched)
    calls = [
        replace(
            CALL,
            scheduler=scheduler,
            audio_length_in_s=LENGTHS[index % len(LENGTHS)],
            num_inference_steps=(11, 5, 14)[index % 3],
            guidance_scale=(1.0, 3.5)[index % 2],
            num_waveforms_per_prompt=2,
            seed=index,
        )
        for index, scheduler in enumerate(SCHEDULERS)
    ]
    check_latents(precisions, stages, calls, together=True)
    assert sum(masked) > len(masked) / 2, "the requests did not share their forwards"


def test_the_other_stages(precisions: Precisions, stages: Stages) -> None:
    prompts = ["rain", CALL.prompt, "a clock ticks", "An engine idles, then revs up", "waves", "birds sing over a lake"]
    rows = [
        as_row(replace(CALL, prompt=prompt, audio_length_in_s=LENGTHS[seed % len(LENGTHS)], seed=seed))
        for seed, prompt in enumerate(prompts)
    ]
    found = [stage_distances(precisions, stages, row) for row in rows]
    ratios = {name: pooled([one[name] for one in found]) for name in found[0]}
    assert len(ratios) == 5
    assert max(ratios.values()) <= BOUND, ratios

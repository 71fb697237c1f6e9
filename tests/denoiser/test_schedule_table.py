"""Tables against the diffusers schedulers that they were read from."""

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audioldm2_triton.contract import SCHEDULERS
from audioldm2_triton.server.clipping import clipping_schedulers
from project import ROOT
from stepping.schedule_table import HISTORY, ScheduleError, ScheduleTables

REFERENCE_CONFIGS = ROOT / "scripts" / "checkpoints" / "reference_configs" / "audioldm2"
SCHEDULER_CONFIG = json.loads((REFERENCE_CONFIGS / "scheduler" / "scheduler_config.json").read_text())
TOLERANCE = 2e-6  # relative: some schedulers round their samples to float32 at every step


TABLES = ScheduleTables(SCHEDULER_CONFIG)


@cache
def solver_of(scheduler: str) -> Any:
    return getattr(diffusers, scheduler).from_config(SCHEDULER_CONFIG)


def worst_difference(scheduler: str, steps: int, seed: int, scale: float = 1.0) -> float:
    """The worst relative difference over a run on random data, every sample compared."""
    solver = solver_of(scheduler)
    solver.set_timesteps(steps)
    built = TABLES.get(scheduler, steps)
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(built.num_evaluations, 1, 2, 8, 8, generator=generator, dtype=torch.float64) * scale
    sample = torch.randn(1, 2, 8, 8, generator=generator, dtype=torch.float64) * solver.init_noise_sigma
    assert torch.equal(built.timesteps, solver.timesteps.float())
    ours, history, worst = sample, torch.zeros(HISTORY, 2, *sample.shape, dtype=torch.float64), 0.0
    for index, timestep in enumerate(solver.timesteps):
        scaled = solver.scale_model_input(sample, timestep)
        worst = max(worst, _relative(ours * built.input_scales[index], scaled))
        sample = solver.step(outputs[index], timestep, sample).prev_sample
        history = torch.cat([torch.stack([ours, outputs[index]])[None], history[:-1]])
        ours = torch.tensordot(built.coefficients[index].flatten(), history.flatten(0, 1), dims=1)
        worst = max(worst, _relative(ours, sample))
    return worst


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_number_of_steps(scheduler: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's quadrature, inside LMS
        worst = {steps: worst_difference(scheduler, steps, seed=steps) for steps in [*range(1, 51), 100, 200]}
    assert max(worst.values()) < TOLERANCE, {steps: value for steps, value in worst.items() if value >= TOLERANCE}


@settings(max_examples=60, deadline=None)
@given(
    scheduler=st.sampled_from(SCHEDULERS),
    steps=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_any_data(scheduler: str, steps: int, seed: int, scale: float) -> None:
    assert worst_difference(scheduler, steps, seed, scale) < TOLERANCE


def test_weights_do_not_cancel() -> None:
    """Large weights of opposite signs would fit the unit vectors and lose the digits of real data."""
    for scheduler in SCHEDULERS:
        sizes = TABLES.get(scheduler, 50).coefficients.abs().amax()
        assert sizes < 20, f"{scheduler}: {sizes}"


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler"])
def test_what_is_not_linear_in_the_window_is_refused_by_name(scheduler: str) -> None:
    config = {**SCHEDULER_CONFIG, "clip_sample": True} if scheduler == "DDIMScheduler" else SCHEDULER_CONFIG
    with pytest.raises(ScheduleError, match=scheduler):
        ScheduleTables(config).get(scheduler, 20)


@pytest.mark.parametrize("changes", [{"clip_sample": None}, {"thresholding": True}, {"clip_sample": True}, {}])
def test_what_is_listed_is_what_can_be_built(changes: dict[str, Any], tmp_path: Path) -> None:
    """`None`: without the key, where a scheduler's own default decides."""
    config = {key: value for key, value in {**SCHEDULER_CONFIG, **changes}.items() if value is not None}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    tables, refused = ScheduleTables(config), {}
    for scheduler in SCHEDULERS:
        for steps in (2, 11):
            try:
                tables.get(scheduler, steps)
            except ScheduleError as error:
                refused[scheduler] = str(error)
    assert set(refused) == set(clipping_schedulers(tmp_path))
    for key in changes:
        assert all(key in message for message in refused.values())


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_steps_that_are_no_numbers_are_refused_by_name(scheduler: str, steps: int) -> None:
    """With a terminal signal-to-noise ratio of zero, a prediction of the noise says nothing about the sample."""
    config = {**SCHEDULER_CONFIG, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    try:
        coefficients = ScheduleTables(config).get(scheduler, steps).coefficients
        refusal = ""
    except ScheduleError as error:
        coefficients, refusal = torch.zeros(0), str(error)
    assert coefficients.isfinite().all()
    assert refusal == "" or refusal.startswith(f"{scheduler} cannot run {steps} steps")
    assert refusal or scheduler != "DDIMScheduler", "its first step divides by zero"


def test_a_configuration_that_a_scheduler_refuses_is_refused_by_name() -> None:
    with pytest.raises(ScheduleError, match="DDIMScheduler refuses the checkpoint's"):
        ScheduleTables({**SCHEDULER_CONFIG, "beta_schedule": "sigmoid"}).get("DDIMScheduler", 20)


def test_steps_that_diffusers_refuses_are_refused_by_name() -> None:
    with pytest.raises(ScheduleError, match="DDIMScheduler cannot run 1001 steps"):
        TABLES.get("DDIMScheduler", 1001)

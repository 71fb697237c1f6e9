"""Turns any linear diffusers scheduler into a table of coefficients, so that one fused update serves a mixed batch.

For a fixed schedule, a deterministic scheduler's next sample is a linear combination of the last few pairs of sample
and model output. No solver is written here: the diffusers scheduler itself runs once on unit vectors, and the
coefficients are read off what it returns.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import diffusers
import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.server import faults
from audioldm2_triton.server.clipping import clipping_keys

HISTORY: Final = 4
"""Pairs of (sample, model output) that a scheduler may look back on; LMS needs all four."""

_FIT_TOLERANCE: Final = 1e-6
"""How well the coefficients must reproduce the scheduler's own result, relative."""

_GOOD_FIT: Final = 1e-12
"""A fit this good is complete: what is left is the rounding of float64."""


class ScheduleError(ValueError):
    """The scheduler cannot run this number of steps, or is not linear within `HISTORY` pairs."""


@dataclass(frozen=True)
class ScheduleTable:
    """One scheduler at one number of steps; `E` is its number of UNet evaluations."""

    init_noise_sigma: float
    timesteps: Tensor  # [E] float32, as the UNet gets them
    input_scales: Tensor  # [E] float32, the sample is multiplied by this before the UNet
    coefficients: Tensor  # [E, HISTORY, 2] float64, for (sample, model output) of this evaluation, the last, ...

    @property
    def num_evaluations(self) -> int:
        return len(self.timesteps)


class ScheduleTables:
    """The tables of one checkpoint, built on first use. Safe to use from several threads."""

    def __init__(self, scheduler_config: dict[str, Any]) -> None:
        self._config = scheduler_config
        self._tables: dict[tuple[str, int], ScheduleTable] = {}  # bounded: there are only so many steps
        self._make_solver = lru_cache(self._new_solver)

    def has(self, scheduler: str, num_inference_steps: int) -> bool:
        """Returns whether `get` returns without building."""
        return (scheduler, num_inference_steps) in self._tables

    def get(self, scheduler: str, num_inference_steps: int) -> ScheduleTable:
        """Raises `ScheduleError`."""
        key = scheduler, num_inference_steps
        if key not in self._tables:
            faults.at("denoiser.schedule")
            self._tables[key] = build_schedule_table(deepcopy(self._make_solver(scheduler)), num_inference_steps)
        return self._tables[key]

    def _new_solver(self, scheduler: str) -> Any:
        # Some constructors take a third of a second, so each runs once.
        try:
            return getattr(diffusers, scheduler).from_config(self._config)
        except (ImportError, MemoryError):
            raise  # the server's fault, not the request's
        except Exception as error:
            raise ScheduleError(f"{scheduler} refuses the checkpoint's scheduler_config.json: {error}") from error


def build_schedule_table(solver: Any, num_inference_steps: int) -> ScheduleTable:
    """Builds the table by running a diffusers scheduler once; the scheduler's state is not reset.

    Raises `ScheduleError`, which names the scheduler, if diffusers refuses the number of steps, if a step is not a
    finite number, or if the scheduler is not linear within `HISTORY` pairs (clipping and thresholding are not).
    """
    scheduler = type(solver).__name__
    refused = f"{scheduler} cannot run {num_inference_steps} steps"
    try:
        # What is not finite is refused below; a warning would only repeat it.
        with np.errstate(all="ignore"):
            solver.set_timesteps(num_inference_steps)
            run = _run_on_unit_vectors(solver)
    except (ImportError, MemoryError):
        raise  # the server's fault, not the request's
    except Exception as error:
        raise ScheduleError(f"{refused}: {error}") from error
    sigma, timesteps = float(solver.init_noise_sigma), solver.timesteps.to(torch.float32)
    numbers = (run.samples, run.result, run.input_scales, timesteps.numpy(), np.array(sigma))
    if not all(np.isfinite(array).all() for array in numbers):
        raise ScheduleError(
            f"{refused} with this checkpoint: its scheduler_config.json leads to a step that is not a finite number"
        )
    coefficients, residual = _fit(run.samples)
    if not residual < _FIT_TOLERANCE or not _is_linear(run):
        keys = clipping_keys(solver.config, scheduler)
        reason = f" ({' and '.join(keys)} in the checkpoint's scheduler_config.json)" if keys else ""
        raise ScheduleError(f"{refused}: it is not linear in its last {HISTORY} samples and model outputs{reason}")
    return ScheduleTable(
        init_noise_sigma=sigma,
        timesteps=timesteps,
        input_scales=torch.from_numpy(run.input_scales).float(),
        coefficients=torch.from_numpy(coefficients),
    )


@dataclass(frozen=True)
class _Run:
    """One pass of a scheduler over unit vectors, and over random data in the same tensors."""

    samples: np.ndarray  # [E + 1, E + 1], as combinations of the first sample and the E model outputs
    input_scales: np.ndarray  # [E]
    data: np.ndarray  # [E + 1, P] a first sample and E model outputs, random
    result: np.ndarray  # [P] the last sample that the scheduler made of `data`


class _Exact(Tensor):
    """A tensor that stays in float64 where a solver would convert it to float32.

    Rounded at every step, DPM-Solver++'s samples gave coefficients that were off by 5e-7.
    """

    def to(self, *_args: Any, **_options: Any) -> "_Exact":
        return self


def _run_on_unit_vectors(solver: Any) -> _Run:
    evaluations = len(solver.timesteps)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(evaluations + 1, 64, generator=generator, dtype=torch.float64)
    data[0] *= float(solver.init_noise_sigma)
    given = torch.cat([torch.eye(evaluations + 1, dtype=torch.float64), data], dim=1)
    given = given[:, None, None, None].as_subclass(_Exact)  # some schedulers want the four axes of latents
    samples, scales = [given[0]], []
    for index, timestep in enumerate(solver.timesteps):
        scales.append(float(solver.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)))
        samples.append(solver.step(given[index + 1], timestep, samples[-1]).prev_sample.double())
    ran = torch.stack(samples).as_subclass(Tensor).flatten(1).numpy()
    return _Run(ran[:, : evaluations + 1], np.array(scales), data.numpy(), ran[-1, evaluations + 1 :])


def _is_linear(run: _Run) -> bool:
    """Returns whether random data of the size of real latents went through the scheduler as the unit vectors did."""
    expected = run.samples[-1] @ run.data
    return bool(np.abs(run.result - expected).max() <= 1e-4 * np.abs(expected).max())


def _fit(samples: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients [E, HISTORY, 2] that give each sample from the pairs before it, and their worst relative residual.

    Each step takes the fewest samples that fit, then the fewest model outputs. Others would fit as well, but with
    large weights that cancel: two samples differ by little, and their difference stands for a model output.
    """
    evaluations = len(samples) - 1
    coefficients = np.zeros((evaluations, HISTORY, 2))
    worst = 0.0
    for index in range(evaluations):
        longest = min(HISTORY, index + 1)
        best = np.inf
        for num_samples, num_outputs in ((s, o) for s in range(1, longest + 1) for o in range(s, longest + 1)):
            fitted, residual = _fit_step(samples, index, num_samples, num_outputs)
            if residual < best:
                best, coefficients[index] = residual, fitted
            if best < _GOOD_FIT:
                break
        worst = max(worst, best)
    return coefficients, worst


def _fit_step(samples: np.ndarray, index: int, num_samples: int, num_outputs: int) -> tuple[np.ndarray, float]:
    """Coefficients [HISTORY, 2] from the latest so many samples and model outputs, and their relative residual."""
    target = samples[index + 1]
    latest = samples[index - np.arange(num_samples)]  # [num_samples, E + 1]
    # Older model outputs can only come in through the samples, which fixes the samples' weights.
    old = index - num_outputs + 2
    weights = np.linalg.lstsq(latest[:, :old].T, target[:old], rcond=None)[0]
    rest = target - weights @ latest
    fitted = np.zeros((HISTORY, 2))
    fitted[:num_samples, 0] = weights
    fitted[:num_outputs, 1] = rest[index + 1 - np.arange(num_outputs)]
    return fitted, float(np.abs(rest[:old]).max() / np.abs(target).max())

"""One training loop for all parts: deterministic by step, resumable, with an average of the weights."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

_SAVE_EVERY: Final = 60.0  # s
_REPORT_EVERY: Final = 20.0  # s
_AVERAGE: Final = 0.999


@dataclass(frozen=True)
class Plan:
    steps: int
    learning_rate: float
    warmup: int = 200  # steps
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient


@dataclass(frozen=True)
class Draw:
    """The randomness of one step, the same whenever the step is taken."""

    numpy: np.random.Generator
    torch: torch.Generator


def draw(seed: int, step: int) -> Draw:
    numpy = np.random.default_rng([seed, step])
    return Draw(numpy, torch.Generator().manual_seed(int(numpy.integers(2**62))))


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module, Draw], Tensor],
    held_out: Callable[[nn.Module], float],
    plan: Plan,
    folder: Path,
) -> nn.Module:
    """Trains `model` for the plan's steps, from the state in `folder` if there is one; returns the averaged weights.

    `loss` gets the model and a step's randomness, `held_out` the averaged model. The state is `<name>.pt`, written
    every minute and at the end; a finished one returns at once. Losses go to `<name>.jsonl` and to the output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    average = copy.deepcopy(model).eval().requires_grad_(False)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, plan.learning_rate, (0.9, 0.98), weight_decay=plan.weight_decay)
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model.train()
    losses: list[float] = []
    saved = reported = time.monotonic()
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _rate(step, plan)
        value = loss(model, draw(0, step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        _update(average, model, min(_AVERAGE, (1 + step) / (10 + step)))
        step += 1
        losses.append(value.item())
        now = time.monotonic()
        if now - saved > _SAVE_EVERY or step == plan.steps:
            _save(path, model, average, optimizer, step)
            saved = now
        if now - reported > _REPORT_EVERY or step == plan.steps:
            with torch.no_grad():
                figures = {
                    "part": name,
                    "step": step,
                    "of": plan.steps,
                    "loss": round(sum(losses) / len(losses), 5),
                    "held_out": round(held_out(average), 5),
                    "s_per_step": round((now - reported) / len(losses), 3),
                }
            with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(figures) + "\n")
            print(json.dumps(figures), flush=True)
            losses, reported = [], time.monotonic()
    return average


def _rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then a half cosine to a hundredth."""
    progress = min(1.0, step / plan.steps)
    return min(1.0, (step + 1) / plan.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def _update(average: nn.Module, model: nn.Module, decay: float) -> None:
    for weight, new_weight in zip(average.parameters(), model.parameters(), strict=True):
        weight.lerp_(new_weight, 1 - decay)
    for buffer, new_buffer in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(new_buffer)


def _save(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    states = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states | {"step": step}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)

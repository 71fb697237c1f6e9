"""MultiDiffusion by hand: the reference UNet, the diffusers scheduler, and windows blended at every evaluation."""

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor

from stepping.request import DenoisingRow, TextStates


def window_weights(frames: int, overlap: int, total: int) -> tuple[list[int], np.ndarray]:
    """The starts of the windows, and what each counts at each of its frames [P, frames]."""
    starts = [start for start in range(0, total, frames - overlap) if start + frames < total] + [total - frames]
    ramp = np.ones(frames)
    for frame in range(overlap):
        ramp[frame] = np.sin(np.pi * (frame + 0.5) / (2 * overlap)) ** 2
        ramp[-1 - frame] = ramp[frame]
    summed = np.zeros(total)
    for start in starts:
        summed[start : start + frames] += ramp
    return starts, np.stack([ramp / summed[start : start + frames] for start in starts])


@torch.no_grad()
def multi_diffusion(
    unet: AudioLDM2UNet2DConditionModel, solver: Any, row: DenoisingRow, frames: int, overlap: int
) -> Tensor:
    """The latents [N, C, H, W] of a row, in windows of so many frames."""
    starts, weights = window_weights(frames, overlap, row.latent_frames)
    solver.set_timesteps(row.num_inference_steps)
    sample = row.noise * solver.init_noise_sigma
    for timestep in solver.timesteps:
        scaled = solver.scale_model_input(sample, timestep)
        prediction = torch.zeros_like(sample)
        for start, weight in zip(starts, weights, strict=True):
            window = scaled[:, :, start : start + frames]
            guided = _predict(unet, window, timestep, row.positive)
            if row.negative is not None:
                negative = _predict(unet, window, timestep, row.negative)
                guided = negative + row.guidance_scale * (guided - negative)
            prediction[:, :, start : start + frames] += guided * torch.from_numpy(weight).to(sample)[:, None]
        sample = solver.step(prediction, timestep, sample).prev_sample
    return sample


def _predict(unet: Any, sample: Tensor, timestep: Tensor, text: TextStates) -> Tensor:
    items = len(sample)
    output: Tensor = unet(
        sample,
        timestep,
        encoder_hidden_states=text.generated_prompt_embeds.expand(items, -1, -1),
        encoder_hidden_states_1=text.prompt_embeds.expand(items, -1, -1),
        encoder_attention_mask_1=text.attention_mask.expand(items, -1),
    ).sample
    return output

"""A checkpoint's UNet as the engine calls it: plain for equal lengths, masked for different ones."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor

from forward_plan import ForwardCosts, fit_cost
from length_masks import LengthMasks, MaskedUNet

PROBES: Final = ((1, 16), (2, 64))
"""(items, latent frames) of the two forwards that a cost is fitted through: one of 0.64 s, two of 2.56 s of audio."""
PROBE_REPEATS: Final = 3


class DenoisingUNet:
    """One UNet on one device; the masked one shares its weights."""

    def __init__(self, unet: Any, width: int) -> None:
        self.config = unet.config
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self._unet = unet
        self._masked = MaskedUNet(unet).eval()
        self._width = width

    def masks(self, valid_frames: Sequence[int], frames: int) -> LengthMasks:
        return self._masked.masks(valid_frames, frames, self._width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_1: Tensor,
        encoder_attention_mask_1: Tensor,
        masks: LengthMasks | None,
    ) -> Tensor:
        texts = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_1": encoder_hidden_states_1,
            "encoder_attention_mask_1": encoder_attention_mask_1,
        }
        if masks is not None:
            masked: Tensor = self._masked(masks, sample, timestep, **texts)
            return masked
        plain: Tensor = self._unet(sample, timestep, **texts, return_dict=False)[0]
        return plain

    @torch.inference_mode()
    def measure_costs(self) -> ForwardCosts:
        """Times a few forwards, which also warms them up."""
        return ForwardCosts(
            plain=fit_cost(*(self._probe(items, frames, masked=False) for items, frames in PROBES)),
            masked=fit_cost(*(self._probe(items, frames, masked=True) for items, frames in PROBES)),
        )

    def _probe(self, items: int, frames: int, masked: bool) -> tuple[int, int, float]:
        generated_dim, prompt_dim = [dim for dim in self.config.cross_attention_dim[0] if dim is not None]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)

        arguments = (
            zeros(items, self.config.in_channels, frames, self._width),
            torch.full((items,), 500.0, device=self.device),
            zeros(items, 8, generated_dim),
            zeros(items, 16, prompt_dim),
            torch.ones(items, 16, device=self.device, dtype=self.dtype),
            self.masks([frames - 1] * items, frames) if masked else None,
        )
        seconds = []
        for _ in range(1 + PROBE_REPEATS):
            start = time.perf_counter()
            self.forward(*arguments)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        # The first is the warm-up; what else runs on the machine only ever adds.
        return items, frames, min(seconds[1:])


def load_unet(checkpoint: Path, width: int, device: torch.device, dtype: torch.dtype) -> DenoisingUNet:
    """The UNet in evaluation mode; its attention is PyTorch's SDPA, the default of diffusers.

    Args:
        width: of the latents, W.
    """
    unet = AudioLDM2UNet2DConditionModel.from_pretrained(
        str(checkpoint / "unet"), torch_dtype=dtype, local_files_only=True
    )
    return DenoisingUNet(unet.to(device).eval(), width)

"""What the engine is asked to do, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TextStates:
    """The conditioning of one UNet batch item, float32 on the host; `L` is this text's T5 length."""

    prompt_embeds: Tensor  # [L, D1] Flan-T5's
    attention_mask: Tensor  # [L] 1 where `prompt_embeds` counts
    generated_prompt_embeds: Tensor  # [T, D0] GPT-2's


@dataclass(frozen=True)
class DenoisingRow:
    """One prompt with everything that its waveforms share."""

    positive: TextStates
    negative: TextStates | None  # None: no guidance, one UNet batch item per waveform instead of two
    guidance_scale: float
    num_inference_steps: int
    scheduler: str  # a diffusers class name
    noise: Tensor  # [N, C, H, W] float32 on the host, of unit variance

    @property
    def num_waveforms(self) -> int:
        return len(self.noise)

    @property
    def latent_frames(self) -> int:
        return self.noise.shape[2]

    @property
    def unet_items(self) -> int:
        """UNet batch items that this row takes in a forward, at most."""
        return self.num_waveforms * (1 if self.negative is None else 2)


@dataclass(frozen=True)
class DenoisingRequest:
    """The rows of one request; they share the number of waveforms and the latent frames."""

    rows: tuple[DenoisingRow, ...]
    deadline_ns: int = 0  # on the monotonic clock; 0: none

    @property
    def unet_items(self) -> int:
        return sum(row.unet_items for row in self.rows)


OnDone = Callable[[Tensor | Exception], None]
"""Called once per request from the engine's thread, with the latents [B, N, C, H, W], float32 on the host, or with why
there are none."""

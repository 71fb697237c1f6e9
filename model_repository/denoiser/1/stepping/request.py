"""The requests that the engine takes, and the callback for its answer."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from audioldm2_triton.contract import DEFAULT_PRIORITY
from stepping.windows import Windowing


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
    windowing: Windowing | None = None  # where the latents are denoised in windows, if they are longer than one

    @property
    def num_waveforms(self) -> int:
        return len(self.noise)

    @property
    def latent_frames(self) -> int:
        return self.noise.shape[2]

    @property
    def unet_items(self) -> int:
        """UNet batch items of one evaluation of this row, at most; those of all windows."""
        return self.num_waveforms * self.num_windows * self.items_per_window

    @property
    def num_windows(self) -> int:
        """The windows of each of its waveforms; 1 for a waveform that is denoised as a whole."""
        return 1 if self.windowing is None else len(self.windowing.starts(self.latent_frames))

    @property
    def items_per_window(self) -> int:
        return 1 if self.negative is None else 2


def _ignore() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class DenoisingRequest:
    """The rows of one request; they share the number of waveforms and the latent frames."""

    rows: tuple[DenoisingRow, ...]
    deadline_ns: int = 0  # on the monotonic clock; 0: none
    priority: str = DEFAULT_PRIORITY
    on_admitted: Callable[[], None] = _ignore  # called from the engine's thread before the first step
    on_stepped: Callable[[float, int], None] | None = None  # the same, after each: seconds and items of the forward

    @property
    def unet_items(self) -> int:
        return sum(row.unet_items for row in self.rows)


OnDone = Callable[[Tensor | Exception], object]
"""Called once per request from the engine's thread, with the latents [B, N, C, H, W], float32 on the host, or with the
error."""

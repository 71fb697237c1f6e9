"""How much arithmetic the stages do, and how much the device can do."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from audioldm2_triton.server.linear import PRODUCT, linear
from audioldm2_triton.server.text_lengths import DEFAULT_MAX_NEW_TOKENS
from benchmarks.timing import time_repeatedly

T5_TOKENS: Final = 16
MATRIX_SIZES: Final = {"cuda": 8192, "cpu": 2048}
MATRIX_REPEATS: Final = 5


def unet_gflop(checkpoint: Path, rows: int, latent_frames: int, latent_width: int) -> float:
    """Counts the FLOPs of one forward of the reference's UNet, however it is computed here."""
    config = json.loads((checkpoint / "unet" / "config.json").read_text())
    generated_dim, prompt_dim = [dim for dim in config["cross_attention_dim"][0] if dim is not None]
    with torch.device("meta"):
        unet: Any = AudioLDM2UNet2DConditionModel.from_config(config)
        inputs = {
            "sample": torch.empty(rows, config["in_channels"], latent_frames, latent_width),
            "timestep": torch.empty(rows),
            "encoder_hidden_states": torch.empty(rows, DEFAULT_MAX_NEW_TOKENS, generated_dim),
            "encoder_hidden_states_1": torch.empty(rows, T5_TOKENS, prompt_dim),
            "encoder_attention_mask_1": torch.empty(rows, T5_TOKENS),
        }
        return count_gflop(lambda: unet(**inputs))


def decoder_gflop(checkpoint: Path, latent_frames: int, latent_width: int) -> float:
    """Counts the FLOPs of the VAE and the vocoder for one waveform, without the overlap of chunks."""
    vae_config = json.loads((checkpoint / "vae" / "config.json").read_text())
    vocoder_config = json.loads((checkpoint / "vocoder" / "config.json").read_text())
    scale = 2 ** (len(vae_config["block_out_channels"]) - 1)
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(vae_config)
        vocoder: Any = SpeechT5HifiGan(SpeechT5HifiGanConfig(**vocoder_config))
        latents = torch.empty(1, vae_config["latent_channels"], latent_frames, latent_width)
        mels = torch.empty(1, latent_frames * scale, latent_width * scale)
        return count_gflop(lambda: vae.decode(latents)) + count_gflop(lambda: vocoder(mels))


def count_gflop(work: Callable[[], object]) -> float:
    """Counts the FLOPs of uncompiled work on this thread."""
    products = {} if PRODUCT is None else {PRODUCT: _product_flop}
    counter = FlopCounterMode(display=False, custom_mapping=products)
    # The fused kernels of attention are not all known to the counter; the plain one is made of products.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops() / 1e9


def _product_flop(hidden_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(hidden_shape) * weight_shape[0]


@torch.inference_mode()
def peak_gflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s of a large matrix product: the best that the device does in practice."""
    size = MATRIX_SIZES[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = time_repeatedly(lambda: linear(left, right), MATRIX_REPEATS, device, warm_up=2)
    return 2 * size**3 / statistics.median(times) / 1e9

"""The components of the demo checkpoint: the classes of the pipeline, small enough for 15 MB in half precision."""

from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from transformers import (
    ClapConfig,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from checkpoints.random_weights import generator, randomise
from checkpoints.shapes import Config, component_config

CLAP_WIDTH: Final = 64
T5_WIDTH: Final = 64
GPT2_WIDTH: Final = 96
LATENT_FRAMES: Final = 64  # of the clips it is trained on: 2.56 s
VOCABULARY: Final = 700
_FLOOR_OF_MELS: Final = 1.84  # how far below zero the standardised mels end

# Cross-attention at the coarsest level only, where a position is 160 ms by a quarter of the bands: most of the weights
# are there (both text encoders and a pair without one at each place), most of the arithmetic is not.
_CHANGES: Final[dict[str, Config]] = {
    "unet": {
        "attention_head_dim": 8,
        "block_out_channels": [48, 64, 96],
        "cross_attention_dim": [[None, GPT2_WIDTH, T5_WIDTH]] * 3,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "sample_size": LATENT_FRAMES,
    },
    "vae": {"block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 256},
    # One layer at the frame rate, then 64 grains of 20 ms (`_as_grains`): an inverse Fourier transform that is learned.
    "vocoder": {
        "upsample_initial_channel": 128,
        "upsample_rates": [1, 160],
        "upsample_kernel_sizes": [3, 320],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
    },
    "text_encoder": {
        "projection_dim": CLAP_WIDTH,
        "audio_config": {
            "depths": [1, 1, 2, 1],
            "hidden_size": 192,
            "num_attention_heads": [1, 2, 4, 8],
            "patch_embeds_hidden_size": 24,
            # Patches of 8 by 8 instead of 4 by 4: a quarter of the arithmetic, which is most of the training of CLAP.
            "patch_size": 8,
            "patch_stride": [8, 8],
            "window_size": 4,
        },
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": VOCABULARY,
            # The tokenizer cuts at 512; the table of positions is longer than all else together.
        },
    },
    "text_encoder_2": {
        "d_ff": 128,
        "d_kv": 16,
        "d_model": T5_WIDTH,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "dropout_rate": 0.0,
    },
    "language_model": {
        "n_embd": GPT2_WIDTH,
        "n_head": 4,
        "n_layer": 2,
        "vocab_size": 64,
        "bos_token_id": 63,
        "eos_token_id": 63,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "projection_model": {
        "text_encoder_dim": CLAP_WIDTH,
        "text_encoder_1_dim": T5_WIDTH,
        "langauge_model_dim": GPT2_WIDTH,
    },
}


def config(component: str, **changes: Any) -> Config:
    """The config of a component: base's with the demo checkpoint's widths, and `changes`."""
    return _merged(_merged(component_config("base", component), _CHANGES.get(component, {})), changes)


def vae() -> Any:
    return AutoencoderKL.from_config(config("vae"))


def vocoder() -> Any:
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**config("vocoder")))
    # The library's own initialisation starts from silence, where no spectral loss has a gradient worth having.
    randomise(model, generator(0, "vocoder"), gain=0.8)
    _as_grains(model)
    return model


@torch.no_grad()
def _as_grains(model: Any) -> None:
    """Starts as a vocoder of windowed cosines, each as loud as its band of the mel is above the floor.

    From random weights a spectral loss finds low tones late and high ones never: one that is a little off costs more
    than silence.
    """
    first, (second, last), bands = model.conv_pre, model.upsampler, model.config.model_in_dim
    first.weight[:bands] *= 0.1
    first.weight[range(bands), range(bands), first.weight.shape[2] // 2] = 1.0
    first.bias[:bands] = _FLOOR_OF_MELS
    second.weight *= 0.1
    second.weight[range(bands), range(bands), second.weight.shape[2] // 2] = 1.0
    frequencies = _mel_spaced(bands) / model.config.sampling_rate
    time = torch.arange(last.weight.shape[2]) - last.weight.shape[2] / 2
    phases = torch.rand(last.weight.shape[:2], generator=generator(0, "grains")) * 2 * torch.pi
    cosines = torch.cos(2 * torch.pi * frequencies[:, None, None] * time + phases[..., None])
    last.weight.copy_(0.1 * torch.hann_window(len(time), periodic=False) * cosines)  # [bands, channels, samples]
    for block in model.resblocks:
        for layer in block.convs2:
            layer.weight.zero_()
    model.conv_post.weight.zero_()
    model.conv_post.weight[:, :, model.conv_post.weight.shape[2] // 2] = 1 / last.weight.shape[1] ** 0.5


def _mel_spaced(count: int) -> torch.Tensor:
    """Frequencies in Hz, up to the Nyquist frequency, evenly spaced in mel and rounded to what 10 ms repeat."""
    mels = (torch.arange(count) + 0.5) / count * 2595 * torch.log10(torch.tensor(1 + 8000 / 700))
    return (700 * (10 ** (mels / 2595) - 1) / 100).round().clamp(min=1) * 100


def clap() -> Any:
    return ClapModel(ClapConfig(**config("text_encoder")))


def t5(vocabulary: int) -> Any:
    return T5EncoderModel(T5Config(**config("text_encoder_2", vocab_size=vocabulary)))


def language_model() -> Any:
    return GPT2LMHeadModel(GPT2Config(**config("language_model")))


def projection_model() -> Any:
    model = AudioLDM2ProjectionModel.from_config(config("projection_model"))
    for name, parameter in model.named_parameters():  # the embeddings of start and end are ones: all alike
        if name.startswith(("sos", "eos")):
            torch.nn.init.normal_(parameter)
    return model


def unet() -> Any:
    return AudioLDM2UNet2DConditionModel.from_config(config("unet"))


def _merged(config: Config, changes: Config) -> Config:
    merged = dict(config)
    for key, value in changes.items():
        merged[key] = _merged(config[key], value) if isinstance(value, dict) else value
    return merged

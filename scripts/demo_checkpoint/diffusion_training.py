"""Training of the UNet on cached latents and conditioning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from checkpoints.shapes import component_config

from . import parts
from .corpus import Corpus, tensor
from .training import Draw, Plan, train

UNET_PLAN: Final = Plan(steps=16_000, learning_rate=1e-3)
TOKENS: Final = 40  # of T5, the longest caption
_BATCH: Final = 16
_EMPTY: Final = 0.1
_MAX_SNR: Final = 5.0
_CHUNK: Final = 8


@dataclass(frozen=True)
class Conditioning:
    """The embeddings of captions, or of the empty prompt padded to each length."""

    generated: np.ndarray  # float16 [prompts, 8, width]
    states: np.ndarray  # float16 [prompts, TOKENS, width]
    mask: np.ndarray  # bool [prompts, TOKENS]


def cache_latents(corpus: Corpus, vae: Any, folder: Path) -> tuple[np.ndarray, float]:
    """Latents float16 [sounds, channels, frames, width] (the means) and the factor that gives them unit variance."""
    path = folder / "latents.npy"
    if not path.exists():
        rows = []
        with torch.inference_mode():
            for start in range(0, corpus.size, _CHUNK):
                mels = tensor(corpus.mels, range(start, min(start + _CHUNK, corpus.size))).unsqueeze(1)
                rows.append(vae.encode(mels).latent_dist.mode().numpy().astype(np.float16))
        np.save(path.with_suffix(".new.npy"), np.concatenate(rows))
        path.with_suffix(".new.npy").replace(path)
    latents = np.load(path, mmap_mode="r")
    return latents, float(1 / latents[:1000].astype(np.float32).std())


@torch.no_grad()
def cache_conditioning(pipeline: Any, captions: list[str], path: Path) -> tuple[Conditioning, Conditioning]:
    """Encodes the captions, one length at a time, and the empty prompt with the pipeline's own `encode_prompt`.

    Prompts of one length together, since the positions of GPT-2 depend on the padding. The empty prompt is padded to
    the length of the prompt that it accompanies, as in the pipeline.
    """
    if not path.exists():
        tokenizer = pipeline.tokenizer_2
        # CLAP's padding changes nothing but the time, which grows with its square.
        pipeline.tokenizer.model_max_length = max(len(pipeline.tokenizer(text).input_ids) for text in captions)
        lengths = np.array([min(TOKENS, len(tokenizer(caption).input_ids)) for caption in captions])
        count = len(captions)
        generated = np.zeros((count + TOKENS + 1, 8, parts.GPT2_WIDTH), np.float16)
        states = np.zeros((count + TOKENS + 1, TOKENS, parts.T5_WIDTH), np.float16)
        mask = np.zeros((count + TOKENS + 1, TOKENS), bool)
        for length in np.unique(lengths):
            (rows,) = np.nonzero(lengths == length)
            for start in range(0, len(rows), 100):
                chunk = rows[start : start + 100]
                prompts = [captions[row] for row in chunk]
                # The unconditional half comes first.
                t5, attention, gpt2 = pipeline.encode_prompt(prompts, "cpu", 1, True)
                for part, values in ((generated, gpt2), (states, t5), (mask, attention)):
                    empty, conditional = values.chunk(2)
                    if part is generated:
                        part[chunk] = conditional.numpy()
                        part[count + length] = empty[0].numpy()
                    else:
                        part[chunk, :length] = conditional.numpy()
                        part[count + length, :length] = empty[0].numpy()
        np.savez(path.with_suffix(".new.npz"), generated=generated, states=states, mask=mask, count=count)
        path.with_suffix(".new.npz").replace(path)
    with np.load(path) as arrays:
        generated, states, mask = arrays["generated"], arrays["states"], arrays["mask"]
        count = int(arrays["count"])
    return (
        Conditioning(generated[:count], states[:count], mask[:count]),
        Conditioning(generated[count:], states[count:], mask[count:]),
    )


def train_unet(
    start: Any,
    latents: np.ndarray,
    scaling_factor: float,
    conditioning: tuple[Conditioning, Conditioning],
    shares: np.ndarray,
    folder: Path,
    plan: Plan = UNET_PLAN,
) -> Any:
    """Trains the UNet `start` to predict the noise at a random timestep, one prompt in ten empty.

    `shares` are those of the sounds to train on (`Corpus.shares`), in the order of the latents; what comes after them
    is held out.

    The error is the mean square, with the weights min(SNR, 5) / SNR (Hang et al., 2023, "Min-SNR"): what little noise
    there is in the cleanest samples says nothing about the prompt, and its steps would be lost for the rest.
    """
    scheduler = DDIMScheduler.from_config(component_config("base", "scheduler"))
    prompts, empties = conditioning
    trained = len(shares)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=_MAX_SNR) / snr

    def error(model: Any, rows: Any, empty: np.ndarray, timesteps: Tensor, generator: torch.Generator) -> Tensor:
        clean = tensor(latents, rows) * scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        generated, states, mask = [], [], []
        for row, none in zip(rows, empty, strict=True):
            source, index = (empties, int(prompts.mask[row].sum())) if none else (prompts, int(row))
            # A prompt of each length that occurs was encoded beside its empty one.
            generated.append(source.generated[index])
            states.append(source.states[index])
            mask.append(source.mask[index])
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = model(
            noisy.contiguous(memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=torch.from_numpy(np.stack(generated).astype(np.float32)),
            encoder_hidden_states_1=torch.from_numpy(np.stack(states).astype(np.float32)),
            encoder_attention_mask_1=torch.from_numpy(np.stack(mask)).long(),
            return_dict=False,
        )[0]
        return ((predicted - noise).square().mean((1, 2, 3)) * weights[timesteps]).mean()

    def loss(model: Any, draw: Draw) -> Tensor:
        rows = draw.numpy.choice(trained, _BATCH, p=shares)
        # One timestep from each sixteenth: less variance than drawing each alone.
        offsets = (np.arange(_BATCH) + draw.numpy.random(_BATCH)) / _BATCH
        timesteps = torch.from_numpy((offsets * scheduler.config.num_train_timesteps).astype(np.int64))
        return error(model, rows, draw.numpy.random(_BATCH) < _EMPTY, timesteps, draw.torch)

    def held_out(model: Any) -> float:
        rows = range(trained, trained + 32)
        timesteps = torch.arange(32) * 31 + 15
        return float(error(model, rows, np.zeros(32, bool), timesteps, torch.Generator().manual_seed(0)))

    torch.manual_seed(0)
    model = start.to(memory_format=torch.channels_last)
    return train("unet", model, loss, held_out, plan, folder)

"""How far the reference pipeline and the stages are from the reference pipeline in float64, on the same inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.server.generation_row import GenerationRow
from benchmarks.reference import load_pipeline
from clap_scores import clap_features
from denoising_inputs import draw_noise
from in_process.stages import Stages
from waveform_decoder import decode_mels, vocode

CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Distances:
    """Distances from the results in float64: the reference's in float32, and what is served. One for each item."""

    reference: tuple[float, ...] = ()
    served: tuple[float, ...] = ()

    def __add__(self, other: "Distances") -> "Distances":
        return Distances(self.reference + other.reference, self.served + other.served)

    @property
    def ratio(self) -> float:
        """Served to reference: the geometric mean of the items' ratios.

        Many steps amplify rounding, some waveforms' a hundredfold. Both distances of a waveform grow alike, so that
        its ratio is steady, while a ratio of means is decided by the few that grow most.
        """
        return float(np.exp(np.mean(np.log(self.served) - np.log(self.reference))))


def distances(exact: Tensor, reference: Tensor, served: Tensor) -> Distances:
    """The largest difference in each item along the first axis, as a share of the item's peak."""

    def apart(values: Tensor) -> tuple[float, ...]:
        if values.shape != exact.shape:
            raise ValueError(f"shape: got {list(values.shape)} but expected {list(exact.shape)}")
        peaks = exact.abs().flatten(1).amax(1)
        return tuple(((values.double() - exact).abs().flatten(1).amax(1) / peaks).tolist())

    return Distances(apart(reference), apart(served))


@dataclass(frozen=True)
class Precisions:
    """The reference pipeline with the same weights in float32 and in float64."""

    single: Any
    double: Any
    scheduler_config: dict[str, Any]  # the checkpoint's


def load_precisions(checkpoint: Path) -> Precisions:
    single, double = (load_pipeline(checkpoint, CPU, torch.float32) for _ in range(2))
    # Converted once loaded, so that the parameters are those of float32 to the last bit.
    return Precisions(single, double.to(torch.float64), dict(single.scheduler.config))


def reference_latents(precisions: Precisions, row: GenerationRow, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the reference's latents from float32 noise [N, C, H, W], in float32 and in float64."""

    def run(pipeline: Any) -> Tensor:
        pipeline.scheduler = getattr(diffusers, row.scheduler).from_config(precisions.scheduler_config)
        latents: Tensor = pipeline(
            row.prompt,
            negative_prompt=row.negative_prompt,
            audio_length_in_s=row.audio_length_in_s,
            num_inference_steps=row.num_inference_steps,
            guidance_scale=row.guidance_scale,
            num_waveforms_per_prompt=row.num_waveforms_per_prompt,
            latents=noise.to(pipeline.dtype),
            output_type="latent",
        ).audios
        return latents

    return run(precisions.single), run(precisions.double)


def latent_distances(
    precisions: Precisions, stages: Stages, rows: Sequence[GenerationRow], together: bool = False
) -> list[Distances]:
    """The distances of each row's latents, from its text and its seed on.

    Args:
        together: whether the rows are in flight at the same time.
    """
    resolved = stages.condition(rows)
    served = stages.denoise(resolved) if together else [stages.denoise([tensors])[0] for tensors in resolved]
    results = []
    for row, (latents,) in zip(rows, served, strict=True):
        single, double = reference_latents(precisions, row, draw_noise(row.seed, tuple(latents.shape)))
        results.append(distances(double, single, latents))
    return results


@torch.inference_mode()
def stage_distances(precisions: Precisions, stages: Stages, row: GenerationRow) -> dict[str, Distances]:
    """The distances of each other stage's result, from the same float32 inputs."""
    return {
        **_text_distances(precisions, stages, row),
        "VAE": _vae_distances(precisions, stages, row),
        "vocoder": _vocoder_distances(precisions, stages, row),
        "CLAP's embedding of audio": _clap_distances(precisions, stages, row),
    }


def _text_distances(precisions: Precisions, stages: Stages, row: GenerationRow) -> dict[str, Distances]:
    (tensors,) = stages.condition([row])
    reference, exact = (
        pipeline.encode_prompt(row.prompt, CPU, 1, False) for pipeline in (precisions.single, precisions.double)
    )
    return {
        name: distances(exact[part], reference[part], torch.from_numpy(tensors[field]))
        for name, part, field in (("T5", 0, "prompt_embeds"), ("GPT-2", 2, "generated_prompt_embeds"))
    }


def _vae_distances(precisions: Precisions, stages: Stages, row: GenerationRow) -> Distances:
    geometry = stages.geometry
    frames = geometry.latent_frames(row.audio_length_in_s)
    latents = draw_noise(row.seed, (1, geometry.latent_channels, frames, geometry.latent_width))
    reference, exact = (
        pipeline.vae.decode(latents.to(pipeline.dtype) / pipeline.vae.config.scaling_factor).sample[:, 0]
        for pipeline in (precisions.single, precisions.double)
    )
    return distances(exact, reference, torch.stack(decode_mels(stages.decoder, list(latents))))


def _vocoder_distances(precisions: Precisions, stages: Stages, row: GenerationRow) -> Distances:
    vocoder = precisions.single.vocoder
    frames = int(row.audio_length_in_s * stages.geometry.sampling_rate) // stages.decoder.reach.samples_per_frame
    mel = draw_noise(row.seed, (1, frames, vocoder.config.model_in_dim))
    chunks = stages.decoder.plan_chunks(frames)
    parts = vocode(stages.decoder, [mel[0, chunk.first_frame : chunk.end_frame] for chunk in chunks])
    served = torch.cat([part[chunk.first_sample : chunk.end_sample] for part, chunk in zip(parts, chunks, strict=True)])
    return distances(precisions.double.vocoder(mel.double()), vocoder(mel), served[None])


def _clap_distances(precisions: Precisions, stages: Stages, row: GenerationRow) -> Distances:
    """Returns the distances of the scores of noise at CLAP's own rate, because the reference resamples with librosa."""
    extractor, clap = precisions.single.feature_extractor, stages.scorer.clap
    rate = extractor.sampling_rate
    audio = 0.1 * draw_noise(row.seed, (1, int(row.audio_length_in_s * rate)))
    heard = extractor(audio[0].numpy(), return_tensors="pt", sampling_rate=rate).input_features
    reference, exact = (
        pipeline.text_encoder.get_audio_features(heard.to(pipeline.dtype)).pooler_output
        for pipeline in (precisions.single, precisions.double)
    )
    (features,) = clap_features(stages.scorer, [audio[0].numpy()], rate)
    return distances(exact, reference, clap.get_audio_features(features).pooler_output)

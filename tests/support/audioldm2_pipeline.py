"""The reference: `diffusers.AudioLDM2Pipeline`, one call per row, and an independent computation of the CLAP score."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import librosa
import numpy as np
import torch

from audioldm2_triton import AudioLDM2Client, GenerationResult
from audioldm2_triton.contract import DEFAULT_SCHEDULER
from audioldm2_triton.server.generation_row import GenerationRow

ROUNDINGS = 8
"""How many times as far apart two computations in float32 may be as the reference is from its own result in float64.

Both have errors of its size, so that they are 1.2 times as far apart in the median, and were at most 1.8 times in 60
calls with two sets of kernels. But one error is a random number: where many steps amplify it, its logarithm has a
standard deviation of about a half, and 8 times is four of these away. `test_precision` has the narrow bound, for means.
"""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the pipeline."""

    prompt: str
    negative_prompt: str = ""
    audio_length_in_s: float = 1.0
    num_inference_steps: int = 4
    guidance_scale: float = 3.5
    num_waveforms_per_prompt: int = 1
    seed: int = 0
    scheduler: str = DEFAULT_SCHEDULER
    transcription: str | None = None  # of checkpoints that speak


class Reference:
    """The pipeline in float32 and, for a measure of what that rounds, in float64. Keeps the audio of each call."""

    def __init__(self, checkpoint: Path, max_new_tokens: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.max_new_tokens = max_new_tokens
        self.pipeline: Any = _load(checkpoint)
        self.scheduler_config = self.pipeline.scheduler.config
        self._audio: dict[Call, np.ndarray] = {}
        self._exact: dict[Call, np.ndarray] = {}

    @cached_property
    def double(self) -> Any:
        """The pipeline in float64."""
        # Converted once loaded, so that the parameters are those of float32 to the last bit.
        return _load(self.checkpoint).to(torch.float64)

    def generate(self, call: Call) -> np.ndarray:
        """The audio [N, S], in generation order: the reference's own ranking is checked by itself."""
        if call not in self._audio:
            generator = torch.Generator("cpu").manual_seed(call.seed)
            self._audio[call] = self._run(self.pipeline, call, generator=generator)
        return self._audio[call]

    def generate_exactly(self, call: Call) -> np.ndarray:
        """The same from the same noise, in float64."""
        if call not in self._exact:
            pipeline = self.double
            frame_in_s = np.prod(pipeline.vocoder.config.upsample_rates) / pipeline.vocoder.config.sampling_rate
            frames = -(-int(call.audio_length_in_s / frame_in_s) // pipeline.vae_scale_factor)
            shape = (call.num_waveforms_per_prompt, pipeline.unet.config.in_channels, frames, 16)
            # Drawn in single precision, as the numbers of a generator depend on it.
            noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(call.seed))
            self._exact[call] = self._run(pipeline, call, latents=noise.double())
        return self._exact[call]

    def tolerance(self, call: Call) -> float:
        """How far the audio of any two computations of a call in float32 may be apart, as a share of the peak."""
        return tolerance(self.generate(call), self.generate_exactly(call))

    def _run(self, pipeline: Any, call: Call, **noise: Any) -> np.ndarray:
        """The audio [N, S] of a call, unranked."""
        pipeline.scheduler = getattr(diffusers, call.scheduler).from_config(self.scheduler_config)
        score_waveforms = pipeline.score_waveforms
        pipeline.score_waveforms = lambda audio, **_: audio
        try:
            audio: np.ndarray = pipeline(
                call.prompt,
                transcription=call.transcription,
                negative_prompt=call.negative_prompt,
                audio_length_in_s=call.audio_length_in_s,
                num_inference_steps=call.num_inference_steps,
                guidance_scale=call.guidance_scale,
                num_waveforms_per_prompt=call.num_waveforms_per_prompt,
                max_new_tokens=self.max_new_tokens,
                **noise,
            ).audios
        finally:
            pipeline.score_waveforms = score_waveforms
        return audio

    @torch.no_grad()
    def embed_audio(self, audio: np.ndarray) -> np.ndarray:
        """CLAP's normalised embeddings [N, D] of audio [N, S], by the pipeline's own path.

        At most 10 s of audio; longer is cropped by chance.
        """
        pipe = self.pipeline
        target = pipe.feature_extractor.sampling_rate
        resampled = librosa.resample(audio, orig_sr=pipe.vocoder.config.sampling_rate, target_sr=target)
        features = pipe.feature_extractor(list(resampled), return_tensors="pt", sampling_rate=target).input_features
        embeds: np.ndarray = pipe.text_encoder.get_audio_features(features).pooler_output.numpy()
        return embeds

    @torch.no_grad()
    def score(self, prompt: str, audio: np.ndarray) -> np.ndarray:
        """Cosine similarities [N] of audio [N, S] with the prompt."""
        inputs = self.pipeline.tokenizer(prompt, return_tensors="pt", padding=True)
        text: np.ndarray = self.pipeline.text_encoder.get_text_features(**inputs).pooler_output.numpy()
        scores: np.ndarray = self.embed_audio(audio) @ text[0]
        return scores


def _load(checkpoint: Path) -> Any:
    pipeline: Any = diffusers.AudioLDM2Pipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(client: AudioLDM2Client, call: Call, ensemble: bool = True) -> GenerationResult:
    """One call through the ensemble; or, as the client does with a single prompt over gRPC, through the stream."""
    arguments = {name: value for name, value in vars(call).items() if name != "prompt"}
    if ensemble:
        return client.generate([call.prompt], **arguments)[0]
    return client.generate(call.prompt, **arguments)


def as_row(call: Call) -> GenerationRow:
    """The call as the stages take it, without Triton."""
    return GenerationRow(
        prompt=call.prompt,
        negative_prompt=call.negative_prompt,
        audio_length_in_s=call.audio_length_in_s,
        num_inference_steps=call.num_inference_steps,
        guidance_scale=call.guidance_scale,
        num_waveforms_per_prompt=call.num_waveforms_per_prompt,
        seed=call.seed,
        scheduler=call.scheduler,
        return_scores=call.num_waveforms_per_prompt > 1,
        transcription=call.transcription or "",
    )


def difference(audio: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the peak."""
    assert audio.shape == expected.shape, f"got {audio.shape} but expected {expected.shape}"
    return float(np.abs(audio - expected).max() / np.abs(expected).max())


def tolerance(single: np.ndarray, double: np.ndarray) -> float:
    """How far any two computations in float32 may be apart, by the reference's results in float32 and in float64."""
    return ROUNDINGS * difference(single, double)


def in_any_order(audio: np.ndarray, expected: np.ndarray) -> float:
    """The difference of two sets of candidates: where scores are equal but for rounding, their order may differ."""
    return max(min(difference(a, b) for a in audio) for b in expected)


def random_call(generator: random.Random, **fixed: Any) -> Call:
    """A call that differs from others in everything that is not fixed."""
    words = [
        "rain",
        "thunder",
        "a",
        "dog",
        "barks",
        "softly",
        "and",
        "then",
        "birds",
        "sing",
        "over",
        "deep",
        "water",
        "while",
        "an",
        "engine",
        "idles",
    ]
    drawn: dict[str, Any] = {
        "prompt": " ".join(generator.sample(words, generator.randint(1, 12))),
        "negative_prompt": " ".join(generator.sample(words, generator.choice([0, 2, 14]))),
        "audio_length_in_s": generator.choice([0.37, 0.64, 1.0, 1.93]),
        "num_inference_steps": generator.choice([2, 4, 7]),
        "guidance_scale": generator.choice([1.0, 2.5, 3.5]),
        "num_waveforms_per_prompt": generator.choice([1, 1, 2]),
        "seed": generator.randrange(2**63),
    }
    return Call(**{**drawn, **fixed})

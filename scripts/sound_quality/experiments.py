"""What the judge says of clips from a running server: kinds, attributes, and the effect of what a request can ask for.

Prompts are phrased as no training caption is, and prompts and seeds are the same in both arms of a comparison.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton import AudioLDM2Client
from demo_checkpoint.captions import caption, mixture_caption
from demo_checkpoint.library import TEXTURES, draw_attributes
from demo_checkpoint.signals import SAMPLING_RATE
from demo_checkpoint.sounds import KINDS
from sound_quality.bootstrap import mean_with_interval
from sound_quality.features import features
from sound_quality.judge import CLIP_LENGTH_IN_S, Judge
from sound_quality.window_layout import Layout

Answers = Sequence[bool] | NDArray[Any]

_PROMPT_SEED: Final = 103
_IN_FLIGHT: Final = 8  # requests


@dataclass(frozen=True)
class Request:
    """A prompt, what it asks for, and the arguments of the client that go with it."""

    prompt: str
    kind: str
    attributes: tuple[str, ...]
    seed: int
    background: str = ""
    negative_prompt: str = ""
    num_inference_steps: int = 20
    scheduler: str = "DPMSolverMultistepScheduler"
    guidance_scale: float = 3.5
    num_waveforms_per_prompt: int = 1
    audio_length_in_s: float = CLIP_LENGTH_IN_S
    window_length_in_s: float = 0.0  # 0: as a whole


@dataclass(frozen=True)
class Share:
    """A share of right answers, or a difference of two of them, with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f}; {self.count})"


@dataclass(frozen=True)
class Comparison:
    """The same requests in two ways."""

    first: Share
    second: Share
    difference: Share  # second - first, paired


def make_requests(count: int) -> list[Request]:
    """All kinds in turn; number i is the same whatever the count."""
    requests = []
    for number in range(count):
        generator = np.random.default_rng((_PROMPT_SEED, number))
        kind = KINDS[number % len(KINDS)]
        attributes = draw_attributes(kind, generator)
        requests.append(Request(caption(kind, attributes, generator, held_out=True), kind, attributes, 1000 + number))
    return requests


def make_mixtures(count: int) -> list[Request]:
    """Sounds in front of a texture, all kinds in turn."""
    requests = []
    for number in range(count):
        generator = np.random.default_rng((_PROMPT_SEED + 1, number))
        kind = KINDS[number % len(KINDS)]
        others = [texture for texture in TEXTURES if texture != kind]
        background = others[int(generator.integers(len(others)))]
        prompt = mixture_caption((kind, ()), (background, ()), generator, held_out=True)
        requests.append(Request(prompt, kind, (), 5000 + number, background))
    return requests


def generate(url: str, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
    """The waveforms [N, S] of each request, the best first."""

    def one(request: Request) -> NDArray[np.float32]:
        return client.generate(
            request.prompt,
            negative_prompt=request.negative_prompt,
            audio_length_in_s=request.audio_length_in_s,
            window_length_in_s=request.window_length_in_s,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            num_waveforms_per_prompt=request.num_waveforms_per_prompt,
            seed=request.seed,
            scheduler=request.scheduler,
        ).audio

    with AudioLDM2Client(url) as client, ThreadPoolExecutor(_IN_FLIGHT) as pool:
        client.server_info()
        return list(pool.map(one, requests))


def first_features(clips: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Features [clips, features] of the first waveform of each."""
    return np.stack([features(clip[0]) for clip in clips])


def share(right: Answers) -> Share:
    """The mean of numbers between -1 and 1, with its confidence interval."""
    return Share(*mean_with_interval(right), len(right))


def compare(first: Answers, second: Answers) -> Comparison:
    pairs = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    return Comparison(share(first), share(second), share(pairs))


def kinds_right(judge: Judge, requests: Sequence[Request], sounds: NDArray[np.float64]) -> list[bool]:
    """Returns whether each sound [features] is of the kind that was asked for."""
    return [name == request.kind for name, request in zip(judge.name_kinds(sounds), requests, strict=True)]


def kinds_heard(judge: Judge, url: str, requests: Sequence[Request]) -> list[bool]:
    """Returns whether what a server makes of each request is of the kind that was asked for."""
    return kinds_right(judge, requests, first_features(generate(url, requests)))


def compare_arms(judge: Judge, url: str, requests: Sequence[Request], **changes: Any) -> Comparison:
    """The kinds as asked for against those of the same requests with `changes`."""
    arms = [requests, [replace(request, **changes) for request in requests]]
    first, second = (kinds_heard(judge, url, arm) for arm in arms)
    return compare(first, second)


def compare_negative(judge: Judge, url: str, count: int) -> Comparison:
    """How often the background of a mixture is heard, without and with a negative prompt that names it."""
    plain = make_mixtures(count)
    heard = []
    for arm in (plain, [replace(request, negative_prompt=request.background) for request in plain]):
        sounds = first_features(generate(url, arm))
        heard.append(judge.texture_probability(sounds, [request.background for request in arm]) > 0.5)
    return compare(heard[0], heard[1])


def compare_candidates(judge: Judge, url: str, requests: Sequence[Request], candidates: int = 4) -> Comparison:
    """The best of several by CLAP score against any one of them, which is their mean."""
    arm = [replace(request, num_waveforms_per_prompt=candidates) for request in requests]
    clips = generate(url, arm)
    right = np.array(
        [kinds_right(judge, arm, np.stack([features(clip[place]) for clip in clips])) for place in range(candidates)]
    )
    return compare(right.mean(0), right[0])


def compare_seams(judge: Judge, url: str, requests: Sequence[Request], layout: Layout) -> Comparison:
    """Long audio in windows: the kinds heard in single windows against those heard across the seams of two.

    Excerpts are as long as a window. Those across a seam have it in their middle.
    """
    arm = [replace(request, audio_length_in_s=layout.length, window_length_in_s=layout.window) for request in requests]
    clips = generate(url, arm)

    def right_at(starts: Sequence[float]) -> NDArray[np.float64]:
        """The share of right excerpts by clip."""
        heard = []
        for start in starts:
            excerpt = slice(round(start * SAMPLING_RATE), round((start + layout.window) * SAMPLING_RATE))
            heard.append(kinds_right(judge, arm, first_features([clip[:, excerpt] for clip in clips])))
        return np.mean(heard, axis=0)

    windows = [index * layout.step for index in range(layout.count)]
    seams = [start + layout.step / 2 for start in windows[:-1]]
    return compare(right_at(windows), right_at(seams))

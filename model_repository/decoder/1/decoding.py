"""Decodes the latents of several requests to each request's audio, ranked within each prompt."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from audioldm2_triton.errors import NonFiniteError, invalid
from audioldm2_triton.server import faults
from audioldm2_triton.server.geometry import AudioGeometry
from clap_scores import ClapScorer, score_waveforms
from waveform_decoder import WaveformDecoder, decode_waveforms


def decode(
    decoder: WaveformDecoder, scorer: ClapScorer, requests: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Returns the output tensors of each ordinary request, by name; see the table in `model_repository/README.md`.

    All waveforms of all requests are decoded together, equal lengths in one call. Raises `NonFiniteError` for
    non-finite audio.
    """
    audios = _decode_all(decoder, requests)
    scores = score_all(scorer, requests, audios, decoder.sampling_rate)
    return [
        {"audio": in_order(audio, ranking["order"]), **ranking}
        for audio, ranking in zip(audios, rank_all(scores, decoder.sampling_rate), strict=True)
    ]


def _decode_all(decoder: WaveformDecoder, requests: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """Each request's audio [B, N, S], in generation order."""
    flat = [torch.from_numpy(latent) for request in requests for row in request["latents"] for latent in row]
    waveforms = iter(decode_waveforms(decoder, flat))
    audios = []
    max_padding = decoder.reach.max_missing_samples
    for request in requests:
        rows, num_waveforms = request["latents"].shape[:2]
        samples = int(request["num_samples"][0, 0])
        audio = torch.stack(
            [fit_length(next(waveforms), samples, max_padding) for _ in range(rows * num_waveforms)]
        ).numpy()
        audios.append(audio.reshape(rows, num_waveforms, samples))
    return audios


def fit_length(waveform: Tensor, samples: int, max_padding: int) -> Tensor:
    """Cuts or pads a waveform [samples made] to exactly `samples`.

    For lengths that are no whole number of mel frames the waveform can fall short by less than a frame, because the
    reference truncates twice: to frames, and to samples. The reference returns the shorter audio; here silence fills
    the promised length, up to `max_padding` samples.

    Raises `InvalidArgumentError` if more is missing, which only a direct call to this stage can cause.
    """
    missing = samples - len(waveform)
    if missing > max_padding:
        raise invalid("num_samples", samples, f"at most {len(waveform) + max_padding} for these latents")
    return functional.pad(waveform[:samples], (0, max(0, missing)))


def score_all(
    scorer: ClapScorer, requests: Sequence[Mapping[str, np.ndarray]], audios: Sequence[np.ndarray], sampling_rate: int
) -> list[np.ndarray]:
    """Returns each request's scores [B, N]; zeros for the rows that asked for none."""
    scores = [np.zeros(audio.shape[:2], np.float32) for audio in audios]
    wanted = [
        (index, row) for index, request in enumerate(requests) for row in np.flatnonzero(request["return_scores"])
    ]
    waveforms = [waveform for index, row in wanted for waveform in audios[index][row]]
    texts = [torch.from_numpy(requests[index]["text_embeds"][row]) for index, row in wanted for _ in audios[index][row]]
    if waveforms:
        given = np.array(score_waveforms(scorer, waveforms, texts, sampling_rate), np.float32)
        given = faults.at("decoder.score", given)
        if not np.isfinite(given).all():
            raise NonFiniteError("decoder: CLAP returned non-finite scores")
        values = iter(given)
        for index, row in wanted:
            scores[index][row] = [next(values) for _ in audios[index][row]]
    return scores


def rank_all(scores: Sequence[np.ndarray], sampling_rate: int) -> list[dict[str, np.ndarray]]:
    """Ranks each request's `score` and `order` [B, N], best first within each prompt, ties by generation order.

    Args:
        scores: in generation order.
    """
    orders = [np.argsort(-score, axis=1, kind="stable") for score in scores]
    return [
        {
            "score": in_order(score, order),
            "order": order.astype(np.int32),
            "sampling_rate": np.full((len(score), 1), sampling_rate, np.int32),
        }
        for score, order in zip(scores, orders, strict=True)
    ]


def in_order(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`values` [B, N, ...] with the waveforms of each prompt in `order` [B, N]."""
    return np.take_along_axis(values, order.reshape(*order.shape, *[1] * (values.ndim - 2)), axis=1)


def warm_up(decoder: WaveformDecoder, scorer: ClapScorer, geometry: AudioGeometry) -> None:
    """Decodes and scores one short clip, so that the first request does not bear one-time costs."""
    shape = (1, 1, geometry.latent_channels, geometry.latent_frames(1.0), geometry.latent_width)
    decode(
        decoder,
        scorer,
        [
            {
                "latents": np.zeros(shape, np.float32),
                "num_samples": np.array([[geometry.num_samples(1.0)]], np.int32),
                "return_scores": np.array([[True]]),
                "text_embeds": np.ones((1, scorer.text_dim), np.float32),
            }
        ],
    )

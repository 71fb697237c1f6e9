"""Decodes in parts: latents to the windows of a mel spectrogram, a window to its audio, the whole audio to scores.

`audioldm2_stream` requests these one after the other, so that the first seconds of a clip can be sent while the rest is
still being made. These requests have the parameter `ctl`, are not for clients, and compute exactly what an ordinary
request computes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import torch

from audioldm2_triton.errors import invalid
from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.stage_tensors import CONTROL, DECODED, MEL, SCORE, VOCODE, WHOLE
from audioldm2_triton.server.tensor_checks import check_equal, check_floats, check_priority, check_range, check_shape
from clap_scores import ClapScorer
from decoding import decode, fit_length, rank_all, score_all
from vocoder_chunks import VocoderChunk
from waveform_decoder import WaveformDecoder, decode_mels, vocode

Tensors: TypeAlias = Mapping[str, np.ndarray]


def check_decodable(control: str, inputs: Tensors, geometry: AudioGeometry, text_dim: int) -> None:
    """Checks a request, since this stage can be called directly. Raises `InvalidArgumentError`.

    Args:
        text_dim: D of `text_embeds` [B, D].
    """
    if control not in DECODED:
        raise invalid(CONTROL, control, "mel, vocode, score or none")
    for name in DECODED[control]:
        if name not in inputs:
            raise invalid(name, None, "a tensor; it is optional only for the server's internal requests")
    mel_bins = geometry.latent_width * geometry.vae_scale_factor
    rows = len(inputs[DECODED[control][0]])
    check_priority(inputs)
    shapes: Mapping[str, tuple[int | None, ...]] = {
        "latents": (rows, None, geometry.latent_channels, None, geometry.latent_width),
        "num_samples": (rows, 1),
        "return_scores": (rows, 1),
        "text_embeds": (rows, text_dim),
        "mel_window": (rows, None, None, mel_bins),
        "kept_samples": (rows, 2),
        "audio": (rows, None, None),
    }
    for name in DECODED[control]:
        check_shape(name, inputs[name], shapes[name])
        check_floats(name, inputs[name])
    if "num_samples" in DECODED[control]:
        # How many the latents give, `fit_length` knows.
        check_range("num_samples", inputs["num_samples"], 1, np.inf)
        check_equal("num_samples", inputs["num_samples"])
    if control == VOCODE:
        check_range("kept_samples", np.diff(inputs["kept_samples"], prepend=0), 0, np.inf)
    # The requests of a stream are for one row.
    if control != WHOLE and rows != 1:
        raise invalid(DECODED[control][0], rows, "one row")


def decode_parts(
    decoder: WaveformDecoder, scorer: ClapScorer, kind: str, requests: Sequence[Tensors]
) -> list[dict[str, np.ndarray]]:
    """Returns the output tensors of each request, by name; all are of one kind of `DECODED`, and computed together.

    Raises `InvalidArgumentError`, and `InternalError` for non-finite values.
    """
    compute = {
        WHOLE: partial(decode, decoder, scorer),
        MEL: partial(_cut_mels, decoder),
        VOCODE: partial(_vocode_windows, decoder),
        SCORE: partial(_score, decoder, scorer),
    }
    with decoder.residency:
        return compute[kind](requests)


def _cut_mels(decoder: WaveformDecoder, requests: Sequence[Tensors]) -> list[dict[str, np.ndarray]]:
    """Cuts mel spectrograms for the vocoder.

    Returns `mel_windows` [1, K, N, L, M], `kept_samples` [1, K, 2], the part of a window's waveform to keep, and
    `sampling_rate` [1, 1].
    """
    mels = iter(
        decode_mels(decoder, [torch.from_numpy(latent) for request in requests for latent in request["latents"][0]])
    )
    results = []
    for request in requests:
        mel = torch.stack([next(mels) for _ in request["latents"][0]]).to("cpu", torch.float32)
        chunks = decoder.plan_chunks(mel.shape[1])
        windows = [mel[:, chunk.first_frame : chunk.end_frame] for chunk in chunks]
        kept = _kept_samples(chunks, int(request["num_samples"][0, 0]))
        rate = np.array([[decoder.sampling_rate]], np.int32)
        cut = {"mel_windows": torch.stack(windows)[None].numpy(), "kept_samples": kept[None], "sampling_rate": rate}
        results.append(cut)
    return results


def _kept_samples(chunks: Sequence[VocoderChunk], num_samples: int) -> np.ndarray:
    """Returns INT32 [K, 2]. The last chunk fills up the promised length, which may be a little beyond its waveform."""
    kept = np.array([(chunk.first_sample, chunk.end_sample) for chunk in chunks], np.int32)
    kept[-1, 1] += num_samples - sum(chunk.num_samples for chunk in chunks)
    return kept


def _vocode_windows(decoder: WaveformDecoder, requests: Sequence[Tensors]) -> list[dict[str, np.ndarray]]:
    """Returns `audio` [1, N, S], this window's part of the clip, in generation order."""
    windows = [torch.from_numpy(window) for request in requests for window in request["mel_window"][0]]
    waveforms = iter(vocode(decoder, windows))
    max_padding = decoder.reach.max_missing_samples
    results = []
    for request in requests:
        first, end = request["kept_samples"][0].tolist()
        parts = [fit_length(next(waveforms)[first:], end - first, max_padding) for _ in request["mel_window"][0]]
        results.append({"audio": torch.stack(parts)[None].numpy()})
    return results


def _score(decoder: WaveformDecoder, scorer: ClapScorer, requests: Sequence[Tensors]) -> list[dict[str, np.ndarray]]:
    """Returns `score` and `order` [1, N], best first, for audio in generation order."""
    scores = score_all(scorer, requests, [request["audio"] for request in requests], decoder.sampling_rate)
    return rank_all(scores, decoder.sampling_rate)

"""Turns the checked rows of several requests into each request's resolved tensors."""

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.errors import NonFiniteError
from audioldm2_triton.server import faults
from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.wanted_file import pack_wanted
from embedding_cache import EmbeddingCache, TextKey
from row_texts import RowTexts, row_texts
from text_encoders import EncodedTexts, TextEncoders, encode_texts

logger = logging.getLogger(__name__)


def condition(
    encoders: TextEncoders,
    cache: EmbeddingCache[EncodedTexts],
    geometry: AudioGeometry,
    requests: Sequence[Sequence[GenerationRow]],
    full_negative_prompt: bool = False,
) -> list[dict[str, np.ndarray]]:
    """Returns the output tensors of each request, by name; see the table in `model_repository/README.md`.

    All texts of all requests that are not in `cache` are encoded together, equal ones once. Texts that are cut are
    logged. For `full_negative_prompt` see `row_texts`. Raises `NonFiniteError` if an encoder returns non-finite values.
    """
    texts = [[row_texts(encoders, row, full_negative_prompt) for row in request] for request in requests]
    for request_texts in texts:
        cuts = [cut for row in request_texts for cut in row.cuts]
        if cuts:
            logger.info("cut: %s", "; ".join(cuts))
    encoded = _encode_rows(encoders, cache, [row for request_texts in texts for row in request_texts])
    results = []
    start = 0
    for request in requests:
        stop = start + len(request)
        results.append(_resolved(geometry, request, encoded[start:stop]))
        start = stop
    return results


def _encode_rows(
    encoders: TextEncoders, cache: EmbeddingCache[EncodedTexts], rows: Sequence[RowTexts]
) -> list[tuple[EncodedTexts, EncodedTexts | None]]:
    """Encodes the prompt of each row and, with guidance, its negative prompt; each has M = 1 and its own length."""
    keys = [key for row in rows for key in (row.prompt, row.negative) if key is not None]
    taken = iter(cache.values(keys, partial(_encode_keys, encoders)))
    return [(next(taken), None if row.negative is None else next(taken)) for row in rows]


def _encode_keys(encoders: TextEncoders, keys: Sequence[TextKey]) -> list[EncodedTexts]:
    singles: list[EncodedTexts] = []
    with encoders.residency:
        for first in range(0, len(keys), encoders.max_texts_per_call):
            part = keys[first : first + encoders.max_texts_per_call]
            tokens = [key.tokens for key in part]
            encoded = encode_texts(encoders, [key.text for key in part], tokens, [key.length for key in part])
            singles += _split(encoded, [len(row) for row in tokens])
    return singles


def _split(encoded: EncodedTexts, lengths: Sequence[int]) -> list[EncodedTexts]:
    text_embeds = faults.at("text_conditioning.encode", encoded.text_embeds)
    on_host = [_to_host(tensor) for tensor in (text_embeds, encoded.prompt_embeds, encoded.generated_prompt_embeds)]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in on_host):
        raise NonFiniteError("text_conditioning: an encoder returned non-finite values")
    text_embeds, prompt_embeds, generated = on_host
    mask = encoded.attention_mask.cpu()
    # Copies, so that a text in the cache does not keep its whole batch alive.
    return [
        EncodedTexts(
            text_embeds[row : row + 1].clone(),
            prompt_embeds[row : row + 1, :length].clone(),
            mask[row : row + 1, :length].clone(),
            generated[row : row + 1].clone(),
        )
        for row, length in enumerate(lengths)
    ]


def _to_host(tensor: Tensor) -> Tensor:
    # Between stages floats travel as FP32: lossless, and every client of a stage can read them.
    return tensor.detach().to("cpu", torch.float32)


def _resolved(
    geometry: AudioGeometry, rows: Sequence[GenerationRow], encoded: Sequence[tuple[EncodedTexts, EncodedTexts | None]]
) -> dict[str, np.ndarray]:
    prompts = [prompt for prompt, _ in encoded]
    negatives = [negative for _, negative in encoded]
    # A negative prompt that is read whole can be longer than its prompt.
    longest = max(text.prompt_embeds.shape[1] for text in (*prompts, *negatives) if text is not None)
    windows = [geometry.window_frames(row.window_length_in_s) for row in rows]

    def column(values: Sequence[object], dtype: type) -> np.ndarray:
        return np.array(values, dtype).reshape(-1, 1)

    def stack(parts: Sequence[EncodedTexts | None], field: str, pad: bool, dtype: type = np.float32) -> np.ndarray:
        shape = getattr(prompts[0], field).shape[1:]
        stacked: np.ndarray = np.zeros((len(parts), longest, *shape[1:]) if pad else (len(parts), *shape), dtype)
        for row, part in enumerate(parts):
            if part is not None:
                values = getattr(part, field)[0].numpy()
                stacked[row, : len(values)] = values
        return stacked

    return {
        "prompt_embeds": stack(prompts, "prompt_embeds", True),
        "attention_mask": stack(prompts, "attention_mask", True, np.int32),
        "generated_prompt_embeds": stack(prompts, "generated_prompt_embeds", False),
        "negative_prompt_embeds": stack(negatives, "prompt_embeds", True),
        "negative_attention_mask": stack(negatives, "attention_mask", True, np.int32),
        "negative_generated_prompt_embeds": stack(negatives, "generated_prompt_embeds", False),
        "text_embeds": stack(prompts, "text_embeds", False),
        "latent_frames": column([geometry.latent_frames(row.audio_length_in_s) for row in rows], np.int32),
        "window_frames": column([frames for frames, _ in windows], np.int32),
        "overlap_frames": column([overlap for _, overlap in windows], np.int32),
        "num_samples": column([geometry.num_samples(row.audio_length_in_s) for row in rows], np.int32),
        "num_inference_steps": column([row.num_inference_steps for row in rows], np.int32),
        "guidance_scale": column([row.guidance_scale for row in rows], np.float32),
        "num_waveforms_per_prompt": column([row.num_waveforms_per_prompt for row in rows], np.int32),
        "seed": column([row.seed for row in rows], np.int64),
        "scheduler": column([row.scheduler.encode() for row in rows], np.object_),
        "return_scores": column([row.return_scores for row in rows], np.bool_),
        "priority": column([row.priority.encode() for row in rows], np.object_),
        "audio_file": pack_wanted(rows),
    }

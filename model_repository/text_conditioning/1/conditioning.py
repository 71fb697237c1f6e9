"""The stage: checked rows of several requests in, each request's resolved tensors out."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.contract import GenerationRow
from audioldm2_triton.errors import InternalError
from audioldm2_triton.geometry import AudioGeometry
from text_encoders import EncodedTexts, TextEncoders, encode_texts, tokenize_t5

MAX_TEXTS_PER_CALL = 64


def condition(
    encoders: TextEncoders, geometry: AudioGeometry, requests: Sequence[Sequence[GenerationRow]]
) -> list[dict[str, np.ndarray]]:
    """The stage's output tensors of each request, by name; see the table in `model_repository/README.md`.

    All texts of all requests are encoded together. Raises `InternalError` where an encoder gives non-finite values.
    """
    rows = [row for request in requests for row in request]
    encoded = _encode_rows(encoders, rows)
    results = []
    start = 0
    for request in requests:
        stop = start + len(request)
        results.append(_resolved(geometry, request, encoded[start:stop]))
        start = stop
    return results


def _encode_rows(
    encoders: TextEncoders, rows: Sequence[GenerationRow]
) -> list[tuple[EncodedTexts, EncodedTexts | None]]:
    """Prompt and, where there is guidance, negative prompt of each row; each of M = 1, as long as its T5 length."""
    texts: list[str] = []
    tokens: list[list[int]] = []
    lengths: list[int] = []
    for row in rows:
        prompt_tokens = tokenize_t5(encoders, row.prompt)
        texts.append(row.prompt)
        tokens.append(prompt_tokens)
        lengths.append(len(prompt_tokens))
        if row.do_classifier_free_guidance:
            # The reference cuts the negative prompt to the prompt's number of tokens, and pads it to that.
            texts.append(row.negative_prompt)
            tokens.append(tokenize_t5(encoders, row.negative_prompt, len(prompt_tokens)))
            lengths.append(len(prompt_tokens))
    singles: list[EncodedTexts] = []
    for first in range(0, len(texts), MAX_TEXTS_PER_CALL):
        part = slice(first, first + MAX_TEXTS_PER_CALL)
        singles += _split(encode_texts(encoders, texts[part], tokens[part], lengths[part]), lengths[part])
    taken = iter(singles)
    return [(next(taken), next(taken) if row.do_classifier_free_guidance else None) for row in rows]


def _split(encoded: EncodedTexts, lengths: Sequence[int]) -> list[EncodedTexts]:
    on_host = [
        _to_host(tensor) for tensor in (encoded.text_embeds, encoded.prompt_embeds, encoded.generated_prompt_embeds)
    ]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in on_host):
        raise InternalError("text_conditioning: an encoder gave non-finite values")
    text_embeds, prompt_embeds, generated = on_host
    mask = encoded.attention_mask.cpu()
    return [
        EncodedTexts(
            text_embeds[row : row + 1],
            prompt_embeds[row : row + 1, :length],
            mask[row : row + 1, :length],
            generated[row : row + 1],
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
    longest = max(prompt.prompt_embeds.shape[1] for prompt in prompts)

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
        "num_samples": column([geometry.num_samples(row.audio_length_in_s) for row in rows], np.int32),
        "num_inference_steps": column([row.num_inference_steps for row in rows], np.int32),
        "guidance_scale": column([row.guidance_scale for row in rows], np.float32),
        "num_waveforms_per_prompt": column([row.num_waveforms_per_prompt for row in rows], np.int32),
        "seed": column([row.seed for row in rows], np.int64),
        "scheduler": column([row.scheduler.encode() for row in rows], np.object_),
        "return_scores": column([row.return_scores for row in rows], np.bool_),
    }

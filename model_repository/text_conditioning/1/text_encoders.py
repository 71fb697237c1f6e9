"""Text to the UNet's conditioning: CLAP and Flan-T5, the projection, and eight hidden states of GPT-2.

The reference is `diffusers.AudioLDM2Pipeline.encode_prompt`. Unlike there, texts of different lengths can share a
call without changing each other's results: GPT-2's sequences are padded on the left, and positions count from each
sequence's own start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, ClapModel, DynamicCache, GPT2Model, T5EncoderModel


@dataclass(frozen=True)
class TextEncoders:
    """The text parts of a checkpoint, in evaluation mode on one device."""

    clap: Any  # ClapModel without its audio tower
    clap_tokenizer: Any
    t5: T5EncoderModel
    t5_tokenizer: Any
    projection: Any  # AudioLDM2ProjectionModel
    language_model: GPT2Model
    num_generated_states: int  # hidden states that GPT-2 adds
    device: torch.device


@dataclass(frozen=True)
class EncodedTexts:
    """The conditioning of M texts; `L` is the longest of their T5 lengths."""

    text_embeds: Tensor  # [M, D] CLAP's, of length 1
    prompt_embeds: Tensor  # [M, L, D1] Flan-T5's
    attention_mask: Tensor  # [M, L] int64, 1 where `prompt_embeds` counts
    generated_prompt_embeds: Tensor  # [M, T, D0] GPT-2's


def load_text_encoders(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """Loads with the dtype rather than casting after, since T5 keeps some layers in float32 when loaded so."""

    def load(model_class: Any, component: str, **options: Any) -> Any:
        # Local only: a server never downloads what it was not given.
        path = str(checkpoint / component)
        return model_class.from_pretrained(path, local_files_only=True, **options).to(device).eval()

    clap = load(ClapModel, "text_encoder", dtype=dtype)
    del clap.audio_model, clap.audio_projection  # the decoder's
    language_model = load(GPT2Model, "language_model", dtype=dtype)
    return TextEncoders(
        clap=clap,
        clap_tokenizer=AutoTokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True),
        t5=load(T5EncoderModel, "text_encoder_2", dtype=dtype),
        t5_tokenizer=AutoTokenizer.from_pretrained(checkpoint / "tokenizer_2", local_files_only=True),
        projection=load(AudioLDM2ProjectionModel, "projection_model", torch_dtype=dtype),
        language_model=language_model,
        num_generated_states=getattr(language_model.config, "max_new_tokens", None) or 8,
        device=device,
    )


def tokenize_t5(encoders: TextEncoders, text: str, length: int | None = None) -> list[int]:
    """T5's tokens of one text, truncated at the tokenizer's limit or at `length`; the last is the end token."""
    limit = encoders.t5_tokenizer.model_max_length if length is None else length
    ids: list[int] = encoders.t5_tokenizer(text, truncation=True, max_length=limit).input_ids
    return ids


@torch.inference_mode()
def encode_texts(
    encoders: TextEncoders, texts: Sequence[str], t5_tokens: Sequence[Sequence[int]], t5_lengths: Sequence[int]
) -> EncodedTexts:
    """Encodes M texts in one call, each as if it were alone.

    Args:
        texts: what CLAP reads.
        t5_tokens: each text's T5 tokens.
        t5_lengths: how long each text's T5 sequence counts as being in GPT-2, at least its number of tokens. The
            reference pads a negative prompt to its prompt's length, which moves the end token's position.
    """
    lengths = torch.tensor(t5_lengths, device=encoders.device)
    text_embeds = _encode_clap(encoders, texts)
    prompt_embeds, attention_mask = _encode_t5(encoders, t5_tokens, max(t5_lengths))
    sequences, masks = _project(encoders, text_embeds, prompt_embeds, attention_mask, t5_lengths)
    generated = generate_hidden_states(encoders.language_model, sequences, masks, encoders.num_generated_states)
    in_length = torch.arange(prompt_embeds.shape[1], device=encoders.device) < lengths[:, None]
    return EncodedTexts(text_embeds, prompt_embeds * in_length[..., None], attention_mask, generated)


def _encode_clap(encoders: TextEncoders, texts: Sequence[str]) -> Tensor:
    # Padded to the longest text only: the mask and RoBERTa's positions make that the same as the reference's 512.
    batch = encoders.clap_tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=encoders.clap_tokenizer.model_max_length,
        return_tensors="pt",
    ).to(encoders.device)
    features: Tensor = encoders.clap.get_text_features(
        batch.input_ids, attention_mask=batch.attention_mask
    ).pooler_output
    return features


def _encode_t5(encoders: TextEncoders, tokens: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(tokens), length), encoders.t5_tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.int64)
    for row, row_tokens in enumerate(tokens):
        ids[row, : len(row_tokens)] = torch.tensor(row_tokens)
        mask[row, : len(row_tokens)] = 1
    mask = mask.to(encoders.device)
    return encoders.t5(ids.to(encoders.device), attention_mask=mask).last_hidden_state, mask


def _project(
    encoders: TextEncoders,
    text_embeds: Tensor,
    prompt_embeds: Tensor,
    attention_mask: Tensor,
    t5_lengths: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """GPT-2's input of each text alone: [sos, clap, eos, sos1, t5 ..., eos1], with its mask."""
    sequences, masks = [], []
    for row, length in enumerate(t5_lengths):
        output = encoders.projection(
            hidden_states=text_embeds[row, None, None].to(encoders.projection.dtype),
            hidden_states_1=prompt_embeds[row : row + 1, :length].to(encoders.projection.dtype),
            attention_mask=attention_mask.new_ones(1, 1),
            attention_mask_1=attention_mask[row : row + 1, :length],
        )
        sequences.append(output.hidden_states[0])
        masks.append(output.attention_mask[0])
    return sequences, masks


def generate_hidden_states(
    language_model: GPT2Model, sequences: Sequence[Tensor], masks: Sequence[Tensor], num_states: int
) -> Tensor:
    """The next `num_states` hidden states of GPT-2 after each sequence, each fed back as the next input.

    Written on `GPT2Model` itself: the reference goes through private helpers of transformers, and computes the
    logits of 50,257 words only to drop them.

    Args:
        sequences: M tensors [length, hidden size] of different lengths.
        masks: M tensors [length], 0 where a position must not be attended to; it counts as a position all the same.

    Returns [M, num_states, hidden size].
    """
    # Padding on the left keeps every sequence's end in the last column, where the next state is read.
    hidden = pad_sequence(list(sequences), batch_first=True, padding_side="left")
    mask = pad_sequence(list(masks), batch_first=True, padding_side="left")
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=hidden.device)
    start = hidden.shape[1] - lengths
    positions = (torch.arange(hidden.shape[1], device=hidden.device) - start[:, None]).clamp(min=0)
    cache = DynamicCache(config=language_model.config)
    states: list[Tensor] = []
    for step in range(num_states):
        output = language_model(
            inputs_embeds=hidden, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden = output.last_hidden_state[:, -1:]
        states.append(hidden)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = (lengths + step)[:, None]
    return torch.cat(states, dim=1)

"""Text to the UNet's conditioning: CLAP and Flan-T5, the projection, and eight hidden states of GPT-2.

The reference is `diffusers.AudioLDM2Pipeline.encode_prompt`. Unlike there, texts of different lengths can share a
call without changing each other's results: GPT-2's sequences are padded on the left, and positions count from each
sequence's own start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer, ClapModel, GPT2Model, StaticCache, T5EncoderModel

from audioldm2_triton.residency import Residency
from state_generation import generate_states, state_cache
from text_buckets import TextBuckets
from text_networks import TextNetworks, text_networks

MAX_TEXTS_PER_CALL = 64
STANCE_OF_REQUESTS = "eager_on_recompile"
# The projection adds a start and an end to CLAP's one position and to T5's.
NUM_ADDED_POSITIONS = 5


@dataclass(frozen=True)
class CompiledNetworks:
    """Compiled forwards, and what they are compiled for."""

    networks: TextNetworks
    buckets: TextBuckets
    caches: Mapping[tuple[int, int], StaticCache]  # GPT-2's keys and values of each bucket


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
    networks: TextNetworks
    compiled: CompiledNetworks | None = None
    residency: Residency = field(default_factory=Residency)  # of the weights, which are on the device inside it

    @property
    def max_texts_per_call(self) -> int:
        """As many as the largest bucket holds, since more would run uncompiled."""
        return MAX_TEXTS_PER_CALL if self.compiled is None else self.compiled.buckets.rows[-1]


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
    t5 = load(T5EncoderModel, "text_encoder_2", dtype=dtype)
    language_model = load(GPT2Model, "language_model", dtype=dtype)
    return TextEncoders(
        clap=clap,
        clap_tokenizer=AutoTokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True),
        t5=t5,
        t5_tokenizer=AutoTokenizer.from_pretrained(checkpoint / "tokenizer_2", local_files_only=True),
        projection=load(AudioLDM2ProjectionModel, "projection_model", torch_dtype=dtype),
        language_model=language_model,
        num_generated_states=getattr(language_model.config, "max_new_tokens", None) or 8,
        device=device,
        networks=text_networks(clap, t5, language_model),
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

    One thread at a time: compiled encoders share the memory of their keys and values.

    Args:
        texts: what CLAP reads.
        t5_tokens: each text's T5 tokens.
        t5_lengths: how long each text's T5 sequence counts as being in GPT-2, at least its number of tokens. The
            reference pads a negative prompt to its prompt's length, which moves the end token's position.
    """
    if encoders.compiled is None:
        return _encode(encoders, texts, t5_tokens, t5_lengths)
    bucket = encoders.compiled.buckets.bucket(len(texts), max(t5_lengths))
    # Whatever was not foreseen at start runs uncompiled: no request waits for a compiler.
    with torch.compiler.set_stance(STANCE_OF_REQUESTS):
        if bucket is None:
            return _encode(encoders, texts, t5_tokens, t5_lengths)
        # Repeats of the first text: never read, and as valid as any.
        repeats = [0] * (bucket[0] - len(texts))
        rows = [*range(len(texts)), *repeats]
        encoded = _encode(
            encoders, [texts[row] for row in rows], [t5_tokens[row] for row in rows], [t5_lengths[row] for row in rows]
        )
    count = len(texts)
    return EncodedTexts(
        encoded.text_embeds[:count],
        encoded.prompt_embeds[:count],
        encoded.attention_mask[:count],
        encoded.generated_prompt_embeds[:count],
    )


def _encode(
    encoders: TextEncoders, texts: Sequence[str], t5_tokens: Sequence[Sequence[int]], t5_lengths: Sequence[int]
) -> EncodedTexts:
    longest = max(t5_lengths)
    networks, length = _networks(encoders, len(texts), longest)
    lengths = torch.tensor(t5_lengths, device=encoders.device)
    text_embeds = _encode_clap(encoders, texts)
    ids, mask = _t5_inputs(encoders, t5_tokens, length)
    prompt_embeds = networks.t5(ids, mask)
    inputs, inputs_mask = _project(encoders, text_embeds, prompt_embeds, mask, lengths)
    cache = _state_cache(encoders, len(texts), length)
    input_lengths = lengths + NUM_ADDED_POSITIONS
    generated = generate_states(networks, cache, inputs, inputs_mask, input_lengths, encoders.num_generated_states)
    in_length = torch.arange(longest, device=encoders.device) < lengths[:, None]
    return EncodedTexts(text_embeds, prompt_embeds[:, :longest] * in_length[..., None], mask[:, :longest], generated)


def _networks(encoders: TextEncoders, rows: int, length: int) -> tuple[TextNetworks, int]:
    """The forwards for `rows` texts of `length` tokens, and the length to pad them to."""
    if encoders.compiled is not None:
        bucket = encoders.compiled.buckets.bucket(rows, length)
        if bucket is not None and bucket[0] == rows:
            return encoders.compiled.networks, bucket[1]
    return encoders.networks, length


def _state_cache(encoders: TextEncoders, rows: int, length: int) -> StaticCache:
    if encoders.compiled is not None and (rows, length) in encoders.compiled.caches:
        return encoders.compiled.caches[rows, length]
    config = encoders.language_model.config
    return state_cache(config, length + NUM_ADDED_POSITIONS, encoders.num_generated_states)


def _encode_clap(encoders: TextEncoders, texts: Sequence[str]) -> Tensor:
    # Padded to the longest text, or a bucket: the mask and RoBERTa's positions make that the same as the
    # reference's 512.
    batch = encoders.clap_tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=encoders.clap_tokenizer.model_max_length,
        return_tensors="pt",
    )
    networks, length = _networks(encoders, *batch.input_ids.shape)
    extra = (0, length - batch.input_ids.shape[1])
    ids = pad(batch.input_ids, extra, value=encoders.clap_tokenizer.pad_token_id)
    return networks.clap(ids.to(encoders.device), pad(batch.attention_mask, extra).to(encoders.device))


def _t5_inputs(encoders: TextEncoders, tokens: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [M, length]."""
    ids = torch.full((len(tokens), length), encoders.t5_tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.int64)
    for row, row_tokens in enumerate(tokens):
        ids[row, : len(row_tokens)] = torch.tensor(row_tokens)
        mask[row, : len(row_tokens)] = 1
    return ids.to(encoders.device), mask.to(encoders.device)


def _project(
    encoders: TextEncoders, text_embeds: Tensor, prompt_embeds: Tensor, attention_mask: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """GPT-2's inputs [sos, clap, eos, sos1, t5 ..., eos1] with their mask, padded on the left.

    The projection pads in the middle instead, between a text's T5 states and its end, which would move the end's
    position in GPT-2.
    """
    dtype = encoders.projection.dtype
    output = encoders.projection(
        hidden_states=text_embeds[:, None].to(dtype),
        hidden_states_1=prompt_embeds.to(dtype),
        attention_mask=attention_mask.new_ones(len(attention_mask), 1),
        attention_mask_1=attention_mask,
    )
    total = output.hidden_states.shape[1]
    columns = torch.arange(total, device=encoders.device) - (prompt_embeds.shape[1] - lengths)[:, None]
    in_sequence = columns >= 0
    columns = columns.clamp(min=0)
    columns[:, -1] = total - 1
    inputs = output.hidden_states.gather(1, columns[..., None].expand_as(output.hidden_states))
    return inputs * in_sequence[..., None], output.attention_mask.gather(1, columns) * in_sequence

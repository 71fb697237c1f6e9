"""Encodes text to the UNet's conditioning: CLAP, Flan-T5 or VITS, the projection, and hidden states of GPT-2.

The reference is `diffusers.AudioLDM2Pipeline.encode_prompt`. Unlike there, texts of different lengths can share a call
without changing each other's results: GPT-2's sequences are padded on the left, and positions count from each
sequence's own start. The padding that the reference has in the middle is left out: nothing attends to it, but the
positions after it count it.
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
from transformers.models.vits.modeling_vits import VitsTextEncoder

from audioldm2_triton.server.linear import replace_linear_layers
from audioldm2_triton.server.residency import Residency
from audioldm2_triton.server.settings import SettingsError
from audioldm2_triton.server.speech import speaks
from audioldm2_triton.server.text_lengths import MAX_TOKENIZER_LENGTH, resolve_max_new_tokens
from state_generation import state_cache
from text_buckets import TextBuckets
from text_networks import TextNetworks, text_networks
from transcriptions import load_transcription_encoder

MAX_TEXTS_PER_CALL = 64
STANCE_OF_REQUESTS = "eager_on_recompile"
# The projection adds a start and an end to CLAP's one position and to the second encoder's.
NUM_ADDED_POSITIONS = 5
_T5_LENGTH = 512  # what T5 was trained on; its positions are relative


@dataclass(frozen=True)
class CompiledNetworks:
    """The compiled forwards and their buckets."""

    networks: TextNetworks
    buckets: TextBuckets
    caches: Mapping[tuple[int, int], StaticCache]  # GPT-2's keys and values of each bucket


@dataclass(frozen=True)
class TextEncoders:
    """The text parts of a checkpoint, in evaluation mode on one device."""

    clap: Any  # ClapModel without its audio tower
    clap_tokenizer: Any
    second: Any  # T5EncoderModel, or VitsTextEncoder in a checkpoint that speaks
    second_tokenizer: Any
    projection: Any  # AudioLDM2ProjectionModel
    language_model: GPT2Model
    num_generated_states: int  # hidden states that GPT-2 adds
    device: torch.device
    networks: TextNetworks
    compiled: CompiledNetworks | None = None
    residency: Residency = field(default_factory=Residency)  # of the weights, which are on the device inside it

    @property
    def speaks(self) -> bool:
        """Returns whether the second encoder reads what is to be said, instead of the prompt."""
        return isinstance(self.second, VitsTextEncoder)

    @property
    def max_texts_per_call(self) -> int:
        """The number of texts in the largest bucket; more would run uncompiled."""
        return MAX_TEXTS_PER_CALL if self.compiled is None else self.compiled.buckets.rows[-1]


@dataclass(frozen=True)
class EncodedTexts:
    """The conditioning of M texts; `L` is the longest of their numbers of tokens of the second encoder."""

    text_embeds: Tensor  # [M, D] CLAP's, of length 1
    prompt_embeds: Tensor  # [M, L, D1] Flan-T5's or VITS's, zeros after a text's own tokens
    attention_mask: Tensor  # [M, L] int64, 1 where `prompt_embeds` counts
    generated_prompt_embeds: Tensor  # [M, T, D0] GPT-2's


def load_text_encoders(
    checkpoint: Path, device: torch.device, dtype: torch.dtype, max_new_tokens: int = 0
) -> TextEncoders:
    """Loads with the dtype rather than casting later, because only then does T5 keep some layers in float32.

    Args:
        max_new_tokens: hidden states that GPT-2 generates; 0: see `resolve_max_new_tokens`.

    Raises `SettingsError` if GPT-2 has too few positions for so many states.
    """

    def load(model_class: Any, component: str, **options: Any) -> Any:
        # Local only: a stage never downloads anything.
        path = str(checkpoint / component)
        return model_class.from_pretrained(path, local_files_only=True, **options).to(device).eval()

    clap = load(ClapModel, "text_encoder", dtype=dtype)
    del clap.audio_model, clap.audio_projection  # the decoder's
    second: Any
    second_tokenizer: Any
    has_speech = speaks(checkpoint)
    if has_speech:
        second, second_tokenizer = load_transcription_encoder(checkpoint, device, dtype)
    else:
        second = load(T5EncoderModel, "text_encoder_2", dtype=dtype)
        second_tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer_2", local_files_only=True)
    language_model = load(GPT2Model, "language_model", dtype=dtype)
    projection = load(AudioLDM2ProjectionModel, "projection_model", torch_dtype=dtype)
    num_states = resolve_max_new_tokens(checkpoint, max_new_tokens)
    clap_tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True)
    text_config = clap.config.text_config
    # RoBERTa's positions begin after the one of the padding token.
    _limit_length(clap_tokenizer, text_config.max_position_embeddings - text_config.pad_token_id - 1)
    room = language_model.config.n_positions - num_states - (NUM_ADDED_POSITIONS - 1)
    if not has_speech:
        if second_tokenizer.model_max_length > MAX_TOKENIZER_LENGTH:
            _limit_length(second_tokenizer, getattr(second.config, "n_positions", None) or _T5_LENGTH)
        _limit_length(second_tokenizer, room)
    if not 0 < second_tokenizer.model_max_length <= room:
        positions, longest = language_model.config.n_positions, second_tokenizer.model_max_length
        most = f"fewer than GPT-2's {positions} positions less {NUM_ADDED_POSITIONS - 1} and the {longest} of a text"
        raise SettingsError(f"max_new_tokens: got {num_states} but expected {most}")
    for network in (clap, second, projection, language_model):
        replace_linear_layers(network)
    return TextEncoders(
        clap=clap,
        clap_tokenizer=clap_tokenizer,
        second=second,
        second_tokenizer=second_tokenizer,
        projection=projection,
        language_model=language_model,
        num_generated_states=num_states,
        device=device,
        networks=text_networks(clap, second, language_model),
    )


def _limit_length(tokenizer: Any, limit: int) -> None:
    """Lowers the length at which texts are cut to what their encoder takes; many tokenizers were saved without one."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


def tokenize_t5(encoders: TextEncoders, text: str, length: int | None = None) -> list[int]:
    """Returns T5's tokens of one text, truncated at the tokenizer's limit or at `length`; the last is the end token."""
    limit = encoders.second_tokenizer.model_max_length if length is None else length
    ids: list[int] = encoders.second_tokenizer(text, truncation=True, max_length=limit).input_ids
    return ids


@torch.inference_mode()
def encode_texts(
    encoders: TextEncoders, texts: Sequence[str], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
) -> EncodedTexts:
    """Encodes M texts in one call, each as if it were alone.

    One thread at a time: compiled encoders share the memory of their keys and values.

    Args:
        texts: what CLAP reads.
        tokens: what the second encoder reads of each text; VITS may read nothing.
        lengths: the length that each text's sequence of tokens counts as in GPT-2, at least their number. The reference
            pads a negative prompt to its prompt's length, which moves the end's position.
    """
    if encoders.compiled is None:
        return _encode(encoders, texts, tokens, lengths)
    bucket = encoders.compiled.buckets.bucket(len(texts), max(map(len, tokens)))
    # Shapes without a bucket run uncompiled: no request waits for a compiler.
    with torch.compiler.set_stance(STANCE_OF_REQUESTS):
        if bucket is None:
            return _encode(encoders, texts, tokens, lengths)
        # Padded with the first text, which is valid; these results are never read.
        repeats = [0] * (bucket[0] - len(texts))
        rows = [*range(len(texts)), *repeats]
        encoded = _encode(
            encoders, [texts[row] for row in rows], [tokens[row] for row in rows], [lengths[row] for row in rows]
        )
    count = len(texts)
    return EncodedTexts(
        encoded.text_embeds[:count],
        encoded.prompt_embeds[:count],
        encoded.attention_mask[:count],
        encoded.generated_prompt_embeds[:count],
    )


def _encode(
    encoders: TextEncoders, texts: Sequence[str], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
) -> EncodedTexts:
    longest = max(1, *map(len, tokens))
    networks, length = _networks(encoders, len(texts), longest)
    text_embeds = _encode_clap(encoders, texts)
    ids, mask = _second_inputs(encoders, tokens, length)
    states = networks.second(ids, mask)
    inputs, inputs_mask, positions = _project(encoders, text_embeds, states, mask, lengths)
    cache = _state_cache(encoders, len(texts), length)
    generated = networks.generate(cache, inputs, inputs_mask, positions, encoders.num_generated_states)
    return EncodedTexts(text_embeds, states[:, :longest] * mask[:, :longest, None], mask[:, :longest], generated)


def _networks(encoders: TextEncoders, rows: int, length: int) -> tuple[TextNetworks, int]:
    """Returns the forwards for `rows` texts of `length` tokens, and the length to pad them to."""
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


def _second_inputs(encoders: TextEncoders, tokens: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Returns ids and mask, int64 [M, length]."""
    ids = torch.full((len(tokens), length), encoders.second_tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.int64)
    for row, row_tokens in enumerate(tokens):
        ids[row, : len(row_tokens)] = torch.tensor(row_tokens, dtype=torch.int64)
        mask[row, : len(row_tokens)] = 1
    return ids.to(encoders.device), mask.to(encoders.device)


def _project(
    encoders: TextEncoders, text_embeds: Tensor, states: Tensor, mask: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes GPT-2's inputs [sos, clap, eos, sos1, second states ..., eos1], left-padded, with mask and positions.

    The projection has the padding in the middle instead, between a text's states and its end.
    """
    dtype = encoders.projection.dtype
    states_1 = states.to(dtype)
    if encoders.projection.use_learned_position_embedding is not None:
        states_1 = pad(states_1, (0, 0, 0, encoders.projection.config.max_seq_length - states.shape[1]))
    projected = encoders.projection(hidden_states=text_embeds[:, None].to(dtype), hidden_states_1=states_1)
    total = states.shape[1] + NUM_ADDED_POSITIONS
    positions = torch.arange(total, device=encoders.device) - (states.shape[1] - mask.sum(1))[:, None]
    in_sequence = positions >= 0
    positions = positions.clamp(min=0)
    columns = positions.clone()
    columns[:, -1] = projected.hidden_states.shape[1] - 1
    positions[:, -1] = torch.tensor(lengths, device=encoders.device) + NUM_ADDED_POSITIONS - 1
    inputs = projected.hidden_states.gather(1, columns[..., None].expand(-1, -1, projected.hidden_states.shape[2]))
    return inputs * in_sequence[..., None], in_sequence.to(mask.dtype), positions

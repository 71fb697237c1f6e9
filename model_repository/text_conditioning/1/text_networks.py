"""The forwards of the text stage as functions of tensors only, which can be compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Model, StaticCache
from transformers.models.vits.modeling_vits import VitsTextEncoder

from state_generation import LanguageModel, generate_states


@dataclass(frozen=True)
class TextNetworks:
    """The forwards; ids, masks and positions are int64, and a mask is 1 where a token counts."""

    clap: Callable[[Tensor, Tensor], Tensor]  # ids [M, L], mask [M, L] -> [M, D], of length 1
    second: Callable[[Tensor, Tensor], Tensor]  # ids [M, L], mask [M, L] -> [M, L, D1], of T5 or VITS
    language_model: LanguageModel
    generate: Callable[[StaticCache, Tensor, Tensor, Tensor, int], Tensor]  # `generate_states` of `language_model`


def text_networks(clap: Any, second: Any, language_model: GPT2Model) -> TextNetworks:
    """The forwards, uncompiled; `second` is a `T5EncoderModel` or a `VitsTextEncoder`."""

    def encode_clap(ids: Tensor, mask: Tensor) -> Tensor:
        # In its final form, because transformers would make it from a number on the host, which no CUDA graph can copy.
        lowest = torch.finfo(clap.dtype).min
        added = torch.zeros(mask.shape, dtype=clap.dtype, device=mask.device).masked_fill(mask == 0, lowest)
        features: Tensor = clap.get_text_features(ids, attention_mask=added[:, None, None]).pooler_output
        return features

    def encode_t5(ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = second(ids, attention_mask=mask).last_hidden_state
        return states

    def encode_vits(ids: Tensor, mask: Tensor) -> Tensor:
        # A row without any token still attends to one, or its scores would overflow; its states are zeros anyway.
        attended = mask.clone()
        attended[:, 0] = 1
        states: Tensor = second(ids, attention_mask=attended, padding_mask=mask[..., None]).last_hidden_state
        return states

    def next_state(inputs: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        output = language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        # A copy: a view would keep the states of the whole prompt.
        return output.last_hidden_state[:, -1:].clone()

    encode_second = encode_vits if isinstance(second, VitsTextEncoder) else encode_t5
    return TextNetworks(encode_clap, encode_second, next_state, partial(generate_states, next_state))

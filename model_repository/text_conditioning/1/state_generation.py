"""Generates hidden states of GPT-2: one forward of the prompt for the first, then one of one position for each other.

Uses `GPT2Model` itself: the reference goes through private helpers of transformers, and computes the logits of 50,257
words only to drop them. Keys and values are in tensors of fixed size, so that all forwards after the
first have the same shapes and can be compiled once.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import GPT2Config, StaticCache

LanguageModel: TypeAlias = Callable[[Tensor, Tensor, Tensor, StaticCache], Tensor]
"""Inputs [M, P, D0], mask [M, slots of the cache], positions [M, P] and the cache, to the last state [M, 1, D0]."""
# Attention kernels on GPUs want the number of keys aligned; slots that are never filled are masked.
SLOT_MULTIPLE = 16


def state_cache(config: GPT2Config, prompt_length: int, num_states: int) -> StaticCache:
    """Keys and values of a prompt and the states after it, not yet allocated."""
    slots = prompt_length + num_states - 1
    return StaticCache(config=config, max_cache_len=-(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE)


def allocate(cache: StaticCache, config: GPT2Config, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Allocates for `rows` prompts ahead of the first forward, which can then be a compiled one."""
    heads = config.num_attention_heads
    cache.early_initialization(rows, heads, config.hidden_size // heads, dtype, device)


def generate_states(
    language_model: LanguageModel,
    cache: StaticCache,
    inputs: Tensor,
    mask: Tensor,
    positions: Tensor,
    num_states: int,
) -> Tensor:
    """The next `num_states` hidden states after each prompt, each fed back as the next input.

    Args:
        cache: from `state_cache` for P; its contents are overwritten.
        inputs: [M, P, hidden size], padded on the left: so every prompt ends in the last column, where the next
            state is read.
        mask: [M, P], 0 for the padding.
        positions: [M, P], what GPT-2 counts each input as; those of the states follow the last.

    Returns [M, num_states, hidden size].
    """
    cache.reset()
    rows, prompt_length = mask.shape
    # Causality hides the slots that are still empty.
    mask = torch.cat([mask, mask.new_ones(rows, cache.get_max_length() - prompt_length)], dim=1)
    state = language_model(inputs, mask, positions, cache)
    states = [state]
    for step in range(1, num_states):
        state = language_model(state, mask, positions[:, -1:] + step, cache)
        states.append(state)
    return torch.cat(states, dim=1)

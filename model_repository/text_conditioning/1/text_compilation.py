"""Compiles the text stage's forwards for a few shapes, before the first request."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from audioldm2_triton.server.compilation import compiled, for_fixed_shapes, graphed
from state_generation import allocate, generate_states, state_cache
from text_buckets import TextBuckets
from text_encoders import NUM_ADDED_POSITIONS, CompiledNetworks, TextEncoders
from text_networks import TextNetworks

logger = logging.getLogger(__name__)


@torch.inference_mode()
def compile_text_encoders(
    encoders: TextEncoders,
    buckets: TextBuckets,
    backend: str | Callable[..., Any] = "inductor",
    use_compiler: bool = True,
) -> TextEncoders:
    """Compiles CLAP, T5 and GPT-2 for every bucket, and logs a line for each.

    Inputs that fit a bucket are padded to it; all others run uncompiled. If the compiler fails, that is logged, and the
    encoders are returned as they were.
    """
    shapes = buckets.shapes
    ready = partial(
        for_fixed_shapes,
        device=encoders.device,
        num_shapes=2 * len(shapes),
        use_compiler=use_compiler,
        backend=backend,
    )
    own, language_model = encoders.networks, encoders.networks.language_model
    if use_compiler:
        language_model = compiled(language_model, 2 * len(shapes), backend)
    # All states in one graph, because its cache counts calls and so must not run more often than it is read.
    generate = graphed(partial(generate_states, language_model), encoders.device)
    networks = TextNetworks(ready(own.clap), ready(own.second), language_model, generate)
    config = encoders.language_model.config
    caches: dict[tuple[int, int], StaticCache] = {}
    for done, (rows, length) in enumerate(shapes, 1):
        started = time.monotonic()
        cache = state_cache(config, length + NUM_ADDED_POSITIONS, encoders.num_generated_states)
        allocate(cache, config, rows, encoders.language_model.dtype, encoders.device)
        caches[rows, length] = cache
        try:
            _run_once(networks, cache, encoders, rows, length)
        except Exception as error:
            logger.error("text_conditioning: compiling failed, going on without: %r", error)
            return encoders
        seconds = time.monotonic() - started
        logger.info(
            "text_conditioning: compiled %d of %d: %d texts of %d tokens, in %.1f s",
            done,
            len(shapes),
            rows,
            length,
            seconds,
        )
    return replace(encoders, compiled=CompiledNetworks(networks, buckets, caches))


def _run_once(networks: TextNetworks, cache: StaticCache, encoders: TextEncoders, rows: int, length: int) -> None:
    ids = torch.zeros(rows, length, dtype=torch.int64, device=encoders.device)
    mask = torch.ones_like(ids)
    networks.clap(ids, mask)
    networks.second(ids, mask)
    total = length + NUM_ADDED_POSITIONS
    inputs = torch.zeros(
        (rows, total, encoders.language_model.config.hidden_size),
        dtype=encoders.projection.dtype,
        device=encoders.device,
    )
    positions = torch.arange(total, device=encoders.device).repeat(rows, 1)
    networks.generate(cache, inputs, mask.new_ones(rows, total), positions, encoders.num_generated_states)

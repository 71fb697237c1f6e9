"""A negative prompt that is longer than its prompt, and what the reference makes of all of it."""

import torch
from torch.nn.functional import pad

from audioldm2_pipeline import Call, Reference

PROMPT = "A dog barks twice"
HEAD = "low quality, distorted sound of a"
NEGATIVE = f"{HEAD} car engine on gravel, with thunder"
CALL = Call(PROMPT, NEGATIVE, 0.5, 6, seed=3)


def embedded(reference: Reference, negative_prompt: str) -> dict[str, torch.Tensor]:
    """What the pipeline takes instead of texts: each encoded as a prompt of its own, and padded to the same length."""
    with torch.no_grad():
        positive, negative = (
            reference.pipeline.encode_prompt(text, "cpu", 1, False) for text in (PROMPT, negative_prompt)
        )
    length = max(positive[0].shape[1], negative[0].shape[1])
    tensors = {}
    for prefix, (states, mask, generated) in (("", positive), ("negative_", negative)):
        extra = length - states.shape[1]
        tensors[f"{prefix}prompt_embeds"] = pad(states, (0, 0, 0, extra))
        tensors[f"{prefix}attention_mask"] = pad(mask, (0, extra))
        tensors[f"{prefix}generated_prompt_embeds"] = generated
    return tensors

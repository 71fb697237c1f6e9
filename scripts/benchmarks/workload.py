"""The requests that the commands send: varied texts, the same arithmetic in each, so that latencies can be compared."""

from typing import Any, Final

from audioldm2_triton.contract import DEFAULT_GUIDANCE_SCALE, DEFAULT_SCHEDULER
from audioldm2_triton.server.generation_row import GenerationRow

PROMPTS: Final = (
    "A hammer hits a wooden surface",
    "rain",
    "A dog barks twice in the distance while leaves rustle in the wind",
    "Techno music with a strong, upbeat tempo and high melodic riffs",
    "a clock ticks",
    "The choir of an old cathedral sings while its bells ring",
    "An engine idles, then revs up and drives away",
    "birds sing over a quiet lake",
)
NEGATIVE_PROMPTS: Final = ("", "low quality", "noise and hum")


def make_rows(count: int, length_s: float, steps: int) -> list[GenerationRow]:
    return [
        GenerationRow(
            prompt=PROMPTS[index % len(PROMPTS)],
            negative_prompt=NEGATIVE_PROMPTS[index % len(NEGATIVE_PROMPTS)],
            audio_length_in_s=length_s,
            num_inference_steps=steps,
            guidance_scale=DEFAULT_GUIDANCE_SCALE,
            num_waveforms_per_prompt=1,
            seed=index,
            scheduler=DEFAULT_SCHEDULER,
            return_scores=False,
        )
        for index in range(count)
    ]


def as_inputs(row: GenerationRow) -> dict[str, Any]:
    """The arguments of the client's `generate`."""
    return {
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "audio_length_in_s": row.audio_length_in_s,
        "num_inference_steps": row.num_inference_steps,
        "seed": row.seed,
    }

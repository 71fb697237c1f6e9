"""One row of a request as the text stage passes it on."""

from dataclasses import dataclass

import numpy as np

from audioldm2_triton.contract import DEFAULT_PRIORITY, DEFAULT_WINDOW_LENGTH_IN_S


@dataclass(frozen=True)
class GenerationRow:
    """One row of a request, checked, with every default filled in."""

    prompt: str
    negative_prompt: str
    audio_length_in_s: float  # the shortest decimal of the FP32 value that travelled
    num_inference_steps: int
    guidance_scale: float
    num_waveforms_per_prompt: int
    seed: int
    scheduler: str
    return_scores: bool
    transcription: str = ""  # what is said; only for checkpoints that speak
    window_length_in_s: float = DEFAULT_WINDOW_LENGTH_IN_S  # as the length; 0: generated as a whole
    priority: str = DEFAULT_PRIORITY
    audio_format: str = ""  # of the files that are wanted; empty: samples

    @property
    def do_classifier_free_guidance(self) -> bool:
        """As in the reference: a scale of up to 1 means no guidance."""
        return self.guidance_scale > 1.0


def shortest_decimal(value: np.float32 | float) -> float:
    """The shortest decimal that rounds to `value` in FP32: 1.93 for the FP32 number 1.92999994755.

    Lengths travel as FP32. Taken literally, half of all lengths on a 10 ms grid would lose a sample or a frame
    against the reference, which truncates.
    """
    return float(str(np.float32(value)))

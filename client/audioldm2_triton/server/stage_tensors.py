"""The tensors that the models of one server pass to each other, and the words of the requests between them.

`tests/test_configurations.py` holds these names and the five `config.pbtxt` against each other.
"""

from collections.abc import Mapping
from typing import Final

TEXT: Final = ("prompt_embeds", "attention_mask", "generated_prompt_embeds")
NEGATIVE_TEXT: Final = tuple(f"negative_{name}" for name in TEXT)
COLUMNS: Final = ("latent_frames", "num_inference_steps", "guidance_scale", "num_waveforms_per_prompt", "scheduler")
"""What the denoiser needs of every row."""
OPTIONAL: Final = ("seed", "noise", "window_frames", "overlap_frames", "deadline_ns")
"""What else the denoiser takes; it needs one of the first two."""
DENOISED: Final = (*TEXT, *NEGATIVE_TEXT, *COLUMNS, *(name for name in OPTIONAL if name != "noise"))
"""What the models at the front send it: all that the text stage has, who draws no noise."""

CONTROL: Final = "ctl"
"""The request parameter that marks what is no ordinary request; not for clients."""
JOB: Final = "job"
"""The request parameter with the name by which the denoiser knows a request."""
CODED: Final = "coded_errors"
"""The request parameter that asks for errors with their codes in the messages: calls between models lose them."""
PROGRESS: Final = "progress"
CANCEL: Final = "cancel"
WHOLE: Final = ""
MEL: Final = "mel"
VOCODE: Final = "vocode"
SCORE: Final = "score"

DECODED: Final[Mapping[str, tuple[str, ...]]] = {
    WHOLE: ("latents", "num_samples", "return_scores", "text_embeds"),
    MEL: ("latents", "num_samples"),
    VOCODE: ("mel_window", "kept_samples"),
    SCORE: ("audio", "return_scores", "text_embeds"),
}
"""What the decoder needs for each kind of request; `deadline_ns` may come with any."""

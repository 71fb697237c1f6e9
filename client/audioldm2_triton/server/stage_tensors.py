"""The stages of one server, the tensors that its models pass to each other, and the parameters of those requests.

`tests/repository/test_configurations.py` compares these names with the five `config.pbtxt`.
"""

from collections.abc import Mapping
from typing import Final

TEXT_CONDITIONING: Final = "text_conditioning"
DENOISER: Final = "denoiser"
DECODER: Final = "decoder"

TEXT: Final = ("prompt_embeds", "attention_mask", "generated_prompt_embeds")
NEGATIVE_TEXT: Final = tuple(f"negative_{name}" for name in TEXT)
COLUMNS: Final = ("latent_frames", "num_inference_steps", "guidance_scale", "num_waveforms_per_prompt", "scheduler")
"""What the denoiser needs of every row."""
OPTIONAL: Final = ("seed", "noise", "window_frames", "overlap_frames", "priority", "deadline_ns", "journal")
"""What the denoiser also accepts; it needs one of the first two."""
DENOISED: Final = (*TEXT, *NEGATIVE_TEXT, *COLUMNS, *(name for name in OPTIONAL if name != "noise"))
"""What `audioldm2` and `audioldm2_stream` send it: everything from the text stage, which draws no noise."""

CONTROL: Final = "ctl"
"""The request parameter that marks a request between models; not for clients."""
JOB: Final = "job"
"""The request parameter with the name by which the denoiser knows a request."""
AFTER: Final = "after"
"""The request parameter with the evaluations after which a request for progress is to be answered."""
CODED: Final = "coded_errors"
"""The request parameter that asks for codes in the error messages, because calls between models lose the codes."""
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
"""What the decoder needs for each kind of request; `DECODED_TOO` may be added to any."""
DECODED_TOO: Final = ("priority", "deadline_ns", "audio_file", "journal")

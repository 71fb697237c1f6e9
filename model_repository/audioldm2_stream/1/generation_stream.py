"""Runs one streamed generation: calls the stages one after the other and sends each result as soon as it exists."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from audioldm2_triton.errors import DEADLINE_EXCEEDED, DeadlineExceededError
from audioldm2_triton.server.stage_tensors import CONTROL, DECODER, DENOISED, MEL, SCORE, TEXT_CONDITIONING, VOCODE
from audioldm2_triton.server.wanted_file import unpack_wanted
from stage_calls import CallStage, Interruption, Send, StageCall, Tensors
from watched_denoising import denoise


@dataclass(frozen=True)
class StreamRequest:
    inputs: Tensors  # of the contract, [1, 1] each
    timeout_us: int  # 0: none


def stream_generation(
    request: StreamRequest, call: CallStage, send: Send, interruption: Interruption
) -> dict[str, np.ndarray]:
    """Sends the progress and the audio; returns the last response.

    The responses before the last are, in this order: each with `step` and `num_steps` INT32 [1, 1], counted from 1;
    each with `audio` FP32 [1, N, samples of the chunk] in generation order, `sampling_rate`, `chunk`, counted from 0,
    and `num_chunks`, INT32 [1, 1]. The last has `score` FP32 [1, N] and `order` INT32 [1, N], best first, and
    `sampling_rate` INT32 and `seed_used` INT64 [1, 1]. If files are wanted, no audio is sent before, and the last also
    has `encoded_audio` BYTES [1, N], best first.

    Raises an `AudioLDM2Error`: a stage's own, the interruption, or `DeadlineExceededError`.
    """
    outputs = [*DENOISED, "num_samples", "return_scores", "text_embeds", "audio_file"]
    conditioning = call(StageCall(TEXT_CONDITIONING, request.inputs, outputs, timeout_us=request.timeout_us))
    deadline_ns = int(conditioning["deadline_ns"][0, 0])

    def check(before: str) -> None:
        reason = interruption()
        if reason is not None:
            raise reason
        if 0 < deadline_ns <= time.monotonic_ns():
            raise DeadlineExceededError(f"{DEADLINE_EXCEEDED} before {before}")

    check("denoising")
    latents = denoise(call, conditioning, send, interruption)
    check("decoding")
    wanted = unpack_wanted(conditioning["audio_file"])
    audio = _send_audio(latents, conditioning, call, _drop if wanted else send, check)
    check("scoring")
    passed_on = ("return_scores", "text_embeds", "priority", "deadline_ns", "audio_file")
    scored = {"audio": audio, **{name: conditioning[name] for name in passed_on}}
    outputs = ["score", "order", "sampling_rate", *(["encoded_audio"] if wanted else [])]
    ranking = call(StageCall(DECODER, scored, outputs, {CONTROL: SCORE}))
    return {**ranking, "seed_used": conditioning["seed"]}


def _drop(tensors: Tensors) -> None:
    """Sends nothing."""


def _send_audio(
    latents: np.ndarray, conditioning: Tensors, call: CallStage, send: Send, check: Callable[[str], None]
) -> np.ndarray:
    """Sends the audio chunk by chunk; returns all of it [1, N, S], in generation order."""
    too = {name: conditioning[name] for name in ("priority", "deadline_ns")}
    inputs = {"latents": latents, "num_samples": conditioning["num_samples"], **too}
    cut = call(StageCall(DECODER, inputs, ["mel_windows", "kept_samples", "sampling_rate"], {CONTROL: MEL}))
    num_chunks = cut["mel_windows"].shape[1]
    parts = []
    for index in range(num_chunks):
        check(f"chunk {index} of {num_chunks}")
        window = {"mel_window": cut["mel_windows"][:, index], "kept_samples": cut["kept_samples"][:, index], **too}
        audio = call(StageCall(DECODER, window, ["audio"], {CONTROL: VOCODE}))["audio"]
        counts = {"chunk": np.array([[index]], np.int32), "num_chunks": np.array([[num_chunks]], np.int32)}
        send({"audio": audio, "sampling_rate": cut["sampling_rate"], **counts})
        parts.append(audio)
    return np.concatenate(parts, axis=2)

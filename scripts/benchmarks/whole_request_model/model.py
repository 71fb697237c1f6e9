"""The baseline of `scripts/benchmark load`: whole requests through the reference pipeline, as Triton batches them.

Only requests of equal length and steps can share a call: what Triton put together is taken apart by them.
"""

import json
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = {
            name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        self.pipeline: Any = diffusers.AudioLDM2Pipeline.from_pretrained(
            parameters["checkpoint"], torch_dtype=getattr(torch, parameters["dtype"]), local_files_only=True
        ).to(parameters["device"])
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(self.pipeline.scheduler.config)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        groups: dict[tuple[float, int], list[int]] = {}
        for index, request in enumerate(requests):
            key = float(_value(request, "audio_length_in_s")), int(_value(request, "num_inference_steps"))
            groups.setdefault(key, []).append(index)
        answers: list[Any] = [None] * len(requests)
        for (length, steps), indices in groups.items():
            for index, audio in zip(
                indices, self._generate([requests[i] for i in indices], length, steps), strict=True
            ):
                answers[index] = pb_utils.InferenceResponse([pb_utils.Tensor("audio", audio[None])])
        return answers

    def _generate(self, requests: Sequence[Any], length: float, steps: int) -> np.ndarray:
        audio: np.ndarray = self.pipeline(
            [_value(request, "prompt").decode() for request in requests],
            negative_prompt=[_value(request, "negative_prompt").decode() for request in requests],
            audio_length_in_s=length,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(int(_value(request, "seed"))) for request in requests],
        ).audios
        return audio.astype(np.float32)


def _value(request: Any, name: str) -> Any:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0, 0]

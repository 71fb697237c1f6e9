"""The baseline of `scripts/benchmark load`: whole requests through the reference pipeline, as Triton batches them.

Only requests of equal length, steps and candidates can share a call: what Triton put together is taken apart by them.
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
        groups: dict[tuple[float, int, int], list[int]] = {}
        for index, request in enumerate(requests):
            key = (
                float(_value(request, "audio_length_in_s")),
                int(_value(request, "num_inference_steps")),
                int(_value(request, "num_waveforms_per_prompt", 1)),
            )
            groups.setdefault(key, []).append(index)
        answers: list[Any] = [None] * len(requests)
        for key, indices in groups.items():
            for index, audio in zip(indices, self._generate([requests[i] for i in indices], *key), strict=True):
                answers[index] = pb_utils.InferenceResponse([pb_utils.Tensor("audio", audio[None])])
        return answers

    def _generate(self, requests: Sequence[Any], length: float, steps: int, waveforms: int) -> np.ndarray:
        """Returns the first of each request's waveforms, as the pipeline ranks them."""
        audio: np.ndarray = self.pipeline(
            [_value(request, "prompt").decode() for request in requests],
            negative_prompt=[_value(request, "negative_prompt").decode() for request in requests],
            audio_length_in_s=length,
            num_inference_steps=steps,
            num_waveforms_per_prompt=waveforms,
            generator=[
                torch.Generator("cpu").manual_seed(int(_value(request, "seed")) + waveform)
                for request in requests
                for waveform in range(waveforms)
            ],
        ).audios
        return audio[::waveforms].astype(np.float32)


def _value(request: Any, name: str, default: Any = None) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy()[0, 0]

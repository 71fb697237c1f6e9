"""All stages in this process, without Triton, through the functions that the models' adapters call."""

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.geometry import AudioGeometry, read_audio_geometry
from audioldm2_triton.server.settings import Settings, resolve_device, resolve_dtype
from conditioning import condition
from decoder_stage import load_decoder_stage
from decoding import decode
from denoiser_stage import load_engines
from denoising_inputs import parse_denoising_request, read_tensor_shapes
from embedding_cache import EmbeddingCache
from in_process.batcher import Batcher
from text_stage import load_text_stage

if TYPE_CHECKING:
    from stepping.denoising_unet import DenoisingUNet

Tensors: TypeAlias = dict[str, np.ndarray]

MAX_BATCH: Final = 32  # as in the models' configurations


class StepTimes:
    """Watches the engine: the time of every forward, by its number of UNet batch items."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}

    def clear(self) -> None:
        self.seconds = {}

    def median(self, rows: int) -> float:
        """Returns the median time of a step, without the first and the last: they wait for admission or the answer.

        Raises `RuntimeError` where no forward had as many.
        """
        if rows not in self.seconds:
            raise RuntimeError(f"rows: got forwards of {sorted(self.seconds)} but expected some of {rows}")
        return statistics.median(self.seconds[rows][1:-1] or self.seconds[rows])

    @property
    def rows_per_forward(self) -> float | None:
        forwards = sum(len(times) for times in self.seconds.values())
        return sum(rows * len(times) for rows, times in self.seconds.items()) / forwards if forwards else None

    def stepped(self, rows: int, seconds: float) -> None:
        self.seconds.setdefault(rows, []).append(seconds)

    def admitted(self, waited_s: float) -> None:
        pass

    def finished(self, request: Any, outcome: Any) -> None:
        pass

    def changed(self, load: Any) -> None:
        pass

    def broke(self, error: Exception, /) -> None:
        raise error


class Stages:
    """The text stage, the engine and the decoder of one checkpoint; usable from several threads."""

    def __init__(self, settings: Settings) -> None:
        self.device = resolve_device(settings)
        self.dtype = resolve_dtype(settings, self.device)
        self.geometry: AudioGeometry = read_audio_geometry(Path(settings.checkpoint))
        self.step_times = StepTimes()
        self._shapes = read_tensor_shapes(settings)
        self._encoders = load_text_stage(settings, self.device)
        # None are kept: the same few texts come again and again here.
        self._embeddings = EmbeddingCache(0)
        self._full_negative_prompt = settings.full_negative_prompt == "on"
        self.decoder, self.scorer = load_decoder_stage(settings, self.geometry, self.device)
        self._engines = load_engines(settings, self.geometry, lambda _: self.step_times)
        self._texts: Batcher[GenerationRow, Tensors] = Batcher(self.condition, MAX_BATCH)
        self._waveforms: Batcher[Tensors, np.ndarray] = Batcher(self.decode, MAX_BATCH)

    def close(self) -> None:
        for part in (self._texts, self._engines, self._waveforms):
            part.close()
        # The engines had forbidden to compile in this process, in which other ways may be measured next.
        torch.compiler.set_stance("default")

    def generate(self, row: GenerationRow) -> np.ndarray:
        """The audio [1, 1, S] of one request; those of other threads share what Triton would let them share."""
        resolved = self._texts.submit(row).result()
        (latents,) = self.denoise([resolved])
        return self._waveforms.submit({**resolved, "latents": latents.numpy()}).result()

    @property
    def unets(self) -> "list[DenoisingUNet]":
        """The engines' UNets, which count their forwards."""
        return [cast("DenoisingUNet", engine._unet) for engine in self._engines.engines]

    @property
    def is_prepared(self) -> bool:
        """Returns whether all stages have forwards of fixed shapes, in all of their shapes."""
        unets = [set(engine.costs.compiled) == set(engine._unet.buckets) for engine in self._engines.engines]
        return all(unets) and self.decoder.compiled is not None and self._encoders.compiled is not None

    def condition(self, rows: Sequence[GenerationRow]) -> list[Tensors]:
        requests = [(row,) for row in rows]
        results: list[Tensors] = condition(
            self._encoders, self._embeddings, self.geometry, requests, self._full_negative_prompt
        )
        return results

    def denoise(self, resolved: Sequence[Tensors]) -> list[Tensor]:
        """The latents of requests that are submitted together."""
        futures: list[Future[Tensor]] = []
        for tensors in resolved:
            future: Future[Tensor] = Future()
            futures.append(future)
            self._engines.submit(parse_denoising_request(tensors, self._shapes), _settle(future))
        return [future.result() for future in futures]

    def decode(self, requests: Sequence[Tensors]) -> list[np.ndarray]:
        with self.decoder.residency:
            return [answer["audio"] for answer in decode(self.decoder, self.scorer, requests)]


def _settle(future: "Future[Tensor]") -> Any:
    def settle(outcome: Tensor | Exception) -> None:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    return settle


@contextmanager
def running_stages(settings: Settings) -> Iterator[Stages]:
    stages = Stages(settings)
    try:
        yield stages
    finally:
        stages.close()

"""The responses of `audioldm2_stream` as events."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.errors import InternalError
from audioldm2_triton.events import AudioChunk, Finished, Progress, StreamEvent
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.transport.wire import InferRequest

Tensors: TypeAlias = Mapping[str, NDArray[Any]]


class StreamReader:
    """Turns the responses to one request into events."""

    def __init__(self, request: InferRequest) -> None:
        self._request = request
        self._num_waveforms = int(request.tensors["num_waveforms_per_prompt"][0, 0])
        self._chunks: list[AudioChunk] = []
        self._finished = False

    def read(self, tensors: Tensors) -> StreamEvent | None:
        """Returns the event in one response; None if it has none of a known kind.

        Tensors may be flat, as in JSON. Raises `InternalError` for an incomplete response.
        """
        try:
            if "audio" in tensors:
                return self._audio_chunk(tensors)
            if "step" in tensors:
                return Progress(_integer(tensors["step"]), _integer(tensors["num_steps"]))
            return self._result(tensors) if "score" in tensors else None
        except (KeyError, ValueError) as error:
            raise InternalError(f"the server's stream has an incomplete response: {error}") from error

    def end(self) -> None:
        """Ends the reading when the server ends the stream. Raises `InternalError` if the last response is missing."""
        if not self._finished:
            raise InternalError("the server ended the stream before its last response")

    def _audio_chunk(self, tensors: Tensors) -> AudioChunk:
        # A copy: the tensors of gRPC are read-only, and the samples are the caller's.
        audio = np.array(tensors["audio"], np.float32).reshape(self._num_waveforms, -1)
        chunk = AudioChunk(audio, *(_integer(tensors[name]) for name in ("chunk", "num_chunks", "sampling_rate")))
        if chunk.chunk != len(self._chunks):
            raise ValueError(f"chunk {chunk.chunk} of {chunk.num_chunks} arrived as number {len(self._chunks)}")
        self._chunks.append(chunk)
        return chunk

    def _result(self, tensors: Tensors) -> Finished:
        if not self._chunks or len(self._chunks) != self._chunks[0].num_chunks:
            raise ValueError(f"there are only {len(self._chunks)} chunks of audio")
        order = np.array(tensors["order"]).reshape(-1)
        if sorted(order) != list(range(self._num_waveforms)):
            raise ValueError(f"`order` is {order.tolist()} for {self._num_waveforms} waveforms")
        scores = np.array(tensors["score"], np.float32).reshape(self._num_waveforms)
        self._finished = True
        return Finished(
            GenerationResult(
                audio=np.concatenate([chunk.audio for chunk in self._chunks], axis=1)[order],
                scores=scores if self._request.scored[0] else None,
                seed=_integer(tensors["seed_used"]),
                sampling_rate=_integer(tensors["sampling_rate"]),
                prompt=self._request.prompts[0],
                arguments=self._request.arguments(0),
                checkpoint=self._request.checkpoint,
            )
        )


def _integer(tensor: NDArray[Any]) -> int:
    return int(np.array(tensor).reshape(-1)[0])

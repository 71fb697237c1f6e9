"""What a request of the page does: its steps, then files to hear and to see; and how a session ends one."""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from audioldm2_triton.aio import AsyncAudioLDM2Client
from audioldm2_triton.audio.encoding import encode_audio
from audioldm2_triton.errors import RequestCancelledError
from audioldm2_triton.events import AudioChunk, Finished, Progress
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.transport.wire import GenerateOptions

_DRAWING: Final = threading.Lock()  # matplotlib draws for one thread at a time


@dataclass(frozen=True)
class Candidate:
    """One waveform."""

    sound: Path
    picture: Path
    score: float | None


@dataclass(frozen=True)
class Beginning:
    """The first seconds of a request whose rest is still being decoded."""

    sounds: tuple[Path, ...]  # in generation order: nobody has ranked them yet
    length_in_s: float


@dataclass(frozen=True)
class Generated:
    """What a request has made."""

    prompt: str
    options: GenerateOptions  # with the seed that was used
    length_in_s: float
    candidates: tuple[Candidate, ...]  # the best first


PageEvent: TypeAlias = Progress | Beginning | Generated


async def generate(
    client: AsyncAudioLDM2Client, prompt: str, options: GenerateOptions, folder: Path
) -> AsyncGenerator[PageEvent, None]:
    """Yields the progress of a request, the beginning of a long one, then what it has made, in files of `folder`.

    Raises `AudioLDM2Error`.
    """
    result = None
    scored: GenerateOptions = {**options, "return_scores": True}
    async with contextlib.aclosing(client.stream(prompt, **scored)) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
            elif isinstance(event, AudioChunk) and event.chunk == 0 and event.num_chunks > 1:
                yield await asyncio.to_thread(_save_beginning, event, folder)
            elif isinstance(event, Finished):
                result = event.result
    assert result is not None  # or the stream would have raised
    candidates = await asyncio.to_thread(_save, result, folder)
    yield Generated(prompt, {**options, "seed": result.seed}, result.duration_in_s, candidates)


def _save_beginning(chunk: AudioChunk, folder: Path) -> Beginning:
    name = secrets.token_urlsafe()
    sounds = tuple(folder / f"{name}-beginning-{index}.wav" for index in range(len(chunk.audio)))
    for path, waveform in zip(sounds, chunk.audio, strict=True):
        path.write_bytes(encode_audio(waveform, chunk.sampling_rate, "wav", {}))
    return Beginning(sounds, chunk.audio.shape[1] / chunk.sampling_rate)


def _save(result: GenerationResult, folder: Path) -> tuple[Candidate, ...]:
    name = secrets.token_urlsafe()
    with _DRAWING:
        return tuple(
            Candidate(
                result.save(folder / f"{name}-{rank}.wav", rank),
                result.plot(folder / f"{name}-{rank}.png", rank),
                None if result.scores is None else float(result.scores[rank]),
            )
            for rank in range(result.num_waveforms)
        )


class Runs:
    """The requests of the page, at most one for each session, in tasks of their own.

    A task is what can be cancelled whether or not anyone reads its events.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def follow(self, session: str, events: AsyncGenerator[PageEvent, None]) -> AsyncGenerator[PageEvent, None]:
        """Passes events on. Raises what they raise, and `RequestCancelledError` once the session has cancelled."""
        await self.cancel(session)
        passed: asyncio.Queue[PageEvent | None] = asyncio.Queue()
        task = asyncio.create_task(_pass_on(events, passed))
        task.add_done_callback(lambda _: passed.put_nowait(None))
        self._tasks[session] = task
        try:
            while (event := await passed.get()) is not None:
                yield event
            if task.cancelled():
                raise RequestCancelledError("cancelled")
            task.result()
        finally:
            if self._tasks.get(session) is task:
                await self.cancel(session)

    async def cancel(self, session: str) -> None:
        """Cancels the request of a session, if there is one, and waits until the server has been told."""
        task = self._tasks.pop(session, None)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})


async def _pass_on(events: AsyncGenerator[PageEvent, None], passed: "asyncio.Queue[PageEvent | None]") -> None:
    async with contextlib.aclosing(events):
        async for event in events:
            passed.put_nowait(event)

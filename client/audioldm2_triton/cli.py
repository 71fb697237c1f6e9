"""The command line: prompts in, audio files out."""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from tqdm import tqdm

from audioldm2_triton import contract
from audioldm2_triton.aio import AsyncAudioLDM2Client
from audioldm2_triton.command_line import BATCH_MAX_RETRIES, build_parser
from audioldm2_triton.errors import AudioLDM2Error
from audioldm2_triton.events import Progress
from audioldm2_triton.files import (
    check_audio_path,
    check_path,
    check_writable,
    import_soundfile,
    read_prompts,
    waveform_files,
)
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.server_info import ServerInfo
from audioldm2_triton.terminal import escape_unprintable, print_info
from audioldm2_triton.transport.resending import DEFAULT_MAX_RETRIES
from audioldm2_triton.transport.wire import GenerateOptions

T = TypeVar("T")

FAILED: Final = 1
INTERRUPTED: Final = 130  # as shells report it: 128 plus the number of SIGINT
REFRESH_IN_S: Final = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    escape_unprintable()
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if sum((arguments.prompt is not None, arguments.batch is not None, arguments.info)) != 1:
        parser.error("expected one of PROMPT, --batch FILE and --info")
    if arguments.batch is not None and (arguments.output is None or arguments.plot is not None):
        parser.error("--batch needs -o DIRECTORY and cannot be combined with --plot")
    if arguments.max_retries is None:
        arguments.max_retries = BATCH_MAX_RETRIES if arguments.batch is not None else DEFAULT_MAX_RETRIES
    if arguments.priority is None:
        arguments.priority = contract.BATCH if arguments.batch is not None else contract.DEFAULT_PRIORITY
    if arguments.max_retries < 0:
        parser.error(f"argument --max-retries: got {arguments.max_retries} but expected at least 0")
    if arguments.concurrency < 1:
        parser.error(f"argument --concurrency: got {arguments.concurrency} but expected at least 1")
    try:
        return asyncio.run(_run(arguments))
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except (AudioLDM2Error, OSError, ImportError) as error:
        _complain(str(error))
        return FAILED


async def _run(arguments: argparse.Namespace) -> int:
    async with AsyncAudioLDM2Client(arguments.url, model=arguments.model, max_retries=arguments.max_retries) as client:
        if arguments.info:
            print_info(await client.server_info(arguments.timeout))
            return 0
        if arguments.batch is not None:
            return await _generate_batch(client, arguments)
        return await _generate_one(client, arguments)


async def _generate_one(client: AsyncAudioLDM2Client, arguments: argparse.Namespace) -> int:
    path = arguments.output or Path("out.wav")
    # Before the server does any work.
    import_soundfile()
    check_audio_path(path)
    if arguments.plot is not None:
        from audioldm2_triton.plot import require_matplotlib

        require_matplotlib()
        check_writable(check_path(arguments.plot, (".png",)))
    info = await client.server_info(arguments.timeout)
    for file in waveform_files(path, _most_waveforms(arguments, info)):
        check_writable(file)
    start = time.monotonic()
    with _progress_bar() as bar:
        # Through the stream, if there is one, so that Ctrl-C also stops the work on the server.
        on_progress = partial(_show_progress, bar) if info.serves_stream else None
        answer = client.generate(arguments.prompt, on_progress=on_progress, **_options(arguments))
        result = await _refreshing(bar, answer)
    _save(result, path, time.monotonic() - start)
    if arguments.plot is not None:
        result.plot(arguments.plot)
    return 0


def _progress_bar() -> "tqdm[NoReturn]":
    """Makes a bar that shows the time until the number of steps is known."""
    return tqdm(bar_format="generating {elapsed}", leave=False, disable=None, file=sys.stderr)


def _show_progress(bar: "tqdm[NoReturn]", progress: Progress) -> None:
    bar.bar_format = "generating {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} {elapsed}"
    bar.total = progress.num_steps
    bar.update(progress.step - bar.n)


async def _refreshing(bar: "tqdm[NoReturn]", answer: Awaitable[T]) -> T:
    """Waits for an answer and keeps the bar's clock running."""
    task = asyncio.ensure_future(answer)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=REFRESH_IN_S)
            bar.refresh()
    finally:
        if task.cancel():
            # Its cancellation has to reach the server before the connection is closed.
            await asyncio.wait({task})
    return task.result()


async def _generate_batch(client: AsyncAudioLDM2Client, arguments: argparse.Namespace) -> int:
    import_soundfile()
    prompts = read_prompts(arguments.batch)
    arguments.output.mkdir(parents=True, exist_ok=True)
    # Without a server the whole batch fails, with one message.
    info = await client.server_info(arguments.timeout)
    for line, _ in prompts:
        for file in waveform_files(_batch_file(arguments.output, line), _most_waveforms(arguments, info)):
            check_writable(file)
    failed: list[int] = []
    waiting = iter(prompts)
    with tqdm(total=len(prompts), unit="prompt", mininterval=0, disable=None, file=sys.stderr) as bar:

        async def work() -> None:
            for line, prompt in waiting:
                start = time.monotonic()
                try:
                    result = await client.generate(prompt, **_options(arguments))
                    _save(result, _batch_file(arguments.output, line), time.monotonic() - start)
                except (AudioLDM2Error, OSError) as error:
                    failed.append(line)
                    _complain(f"line {line}: {error}")
                bar.update()

        await _all(work() for _ in range(min(arguments.concurrency, len(prompts))))
    return FAILED if failed else 0


async def _all(works: Iterable[Awaitable[None]]) -> None:
    """Runs all to the end. If one raises, which would be a bug, or is cancelled, the others are cancelled too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # As in `_refreshing`.
        await asyncio.gather(*tasks, return_exceptions=True)


def _options(arguments: argparse.Namespace) -> GenerateOptions:
    return {
        "negative_prompt": arguments.negative_prompt,
        "audio_length_in_s": arguments.audio_length_in_s,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "num_waveforms_per_prompt": arguments.num_waveforms_per_prompt,
        "seed": arguments.seed,
        "scheduler": arguments.scheduler,
        "transcription": arguments.transcription,
        "window_length_in_s": arguments.window_length_in_s,
        "priority": arguments.priority,
        "timeout": arguments.timeout,
    }


def _most_waveforms(arguments: argparse.Namespace, info: ServerInfo) -> int:
    """Returns the number of waveforms of a prompt, as far as the server accepts it: it refuses more by itself."""
    return min(int(arguments.num_waveforms_per_prompt), info.limits.max_num_waveforms_per_prompt)


def _batch_file(directory: Path, line: int) -> Path:
    return directory / f"{line:04}.wav"


def _save(result: GenerationResult, path: Path, latency_in_s: float) -> None:
    for index, target in enumerate(waveform_files(path, result.num_waveforms)):
        file = result.save(target, index)
        score = "-" if result.scores is None else f"{result.scores[index]:.4f}"
        tqdm.write(
            f"{file}  {result.duration_in_s:.2f} s  seed {result.seed}  score {score}  latency {latency_in_s:.2f} s",
            file=sys.stdout,
        )


def _complain(message: str) -> None:
    tqdm.write(f"audioldm2: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

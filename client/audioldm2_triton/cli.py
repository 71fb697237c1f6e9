"""The command line: prompts in, audio files out."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Final, NoReturn, TypeAlias, TypeVar

from tqdm import tqdm

from audioldm2_triton.aio import AsyncAudioLDM2Client
from audioldm2_triton.audio.encoding import check_encodable
from audioldm2_triton.audio.origin import Origin
from audioldm2_triton.errors import AudioLDM2Error
from audioldm2_triton.events import Progress
from audioldm2_triton.files import STANDARD_OUTPUT, check_path, check_writable
from audioldm2_triton.options import parse_arguments
from audioldm2_triton.orders import Order, most_files, read_orders, report
from audioldm2_triton.players import find_player, play
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.server_info import ServerInfo
from audioldm2_triton.terminal import escape_unprintable, print_info, report_text

T = TypeVar("T")
Player: TypeAlias = Sequence[str] | None

FAILED: Final = 1
INTERRUPTED: Final = 130  # as shells report it: 128 plus the number of SIGINT
REFRESH_IN_S: Final = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    escape_unprintable()
    given = sys.argv[1:] if argv is None else argv
    try:
        if given[:1] == ["web"]:
            from audioldm2_triton.web.command import run_web

            run_web(given[1:])
        return asyncio.run(_run(*parse_arguments(given)))
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except (AudioLDM2Error, OSError, ImportError) as error:
        _complain(str(error))
        return FAILED


async def _run(arguments: argparse.Namespace, origin: Origin | None) -> int:
    async with AsyncAudioLDM2Client(arguments.url, model=arguments.model, max_retries=arguments.max_retries) as client:
        if arguments.info:
            info = await client.server_info(arguments.timeout)
            if arguments.json:
                print(json.dumps(asdict(info)))
            else:
                print_info(info)
            return 0
        # Whatever cannot be written is found before the server does any work.
        orders = read_orders(arguments, origin)
        if arguments.plot is not None:
            from audioldm2_triton.plot import require_matplotlib

            require_matplotlib()
            check_writable(check_path(arguments.plot, (".png",), "--plot"))
        player = find_player() if arguments.play else None
        # Without a server all requests would fail; this is one message.
        info = await client.server_info(arguments.timeout)
        check_encodable(orders[0].audio_format, info.sampling_rate)
        most = min(int(arguments.num_waveforms_per_prompt), info.limits.max_num_waveforms_per_prompt)
        for file in most_files(orders, most):
            check_writable(file)
        if origin is not None and origin.checkpoint != info.checkpoint:
            _complain(f"{arguments.like} was made with {origin.checkpoint}, but the server has {info.checkpoint}")
        if len(orders) == 1 and not orders[0].label:
            await _generate_one(client, arguments, orders[0], info, player)
            return 0
        return await _generate_all(client, arguments, orders, player)


async def _generate_one(
    client: AsyncAudioLDM2Client, arguments: argparse.Namespace, order: Order, info: ServerInfo, player: Player
) -> None:
    start = time.monotonic()
    with _progress_bar() as bar:
        # Through the stream, if there is one, so that Ctrl-C also stops the work on the server.
        on_progress = partial(_show_progress, bar) if info.serves_stream else None
        answer = client.generate(order.prompt, on_progress=on_progress, **order.options)
        result = await _refreshing(bar, answer)
    _save(result, order, time.monotonic() - start, arguments.json)
    if arguments.plot is not None:
        result.plot(arguments.plot)
    if player is not None:
        await play(player, result)


def _progress_bar() -> "tqdm[NoReturn]":
    """Makes a bar that shows the time until the number of steps is known."""
    return tqdm(bar_format="generating {elapsed}", leave=False, disable=None, file=sys.stderr)


def _show_progress(bar: "tqdm[NoReturn]", progress: Progress) -> None:
    bar.bar_format = "generating {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} {elapsed}, {remaining} left"
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


async def _generate_all(
    client: AsyncAudioLDM2Client, arguments: argparse.Namespace, orders: Sequence[Order], player: Player
) -> int:
    failed: list[str] = []
    waiting = iter(orders)
    playing = asyncio.Lock()  # one sound after another
    with tqdm(total=len(orders), unit="request", mininterval=0, disable=None, file=sys.stderr) as bar:

        async def work() -> None:
            for order in waiting:
                start = time.monotonic()
                try:
                    result = await client.generate(order.prompt, **order.options)
                    _save(result, order, time.monotonic() - start, arguments.json)
                    if player is not None:
                        async with playing:
                            await play(player, result)
                except (AudioLDM2Error, OSError) as error:
                    failed.append(order.label)
                    _complain(f"{order.label}: {error}")
                bar.update()

        await _all(work() for _ in range(min(arguments.concurrency, len(orders))))
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


def _save(result: GenerationResult, order: Order, latency_in_s: float, as_json: bool) -> None:
    for rank, path in order.files(result.num_waveforms):
        if path == STANDARD_OUTPUT:
            sys.stdout.buffer.write(result.encode(order.audio_format, rank))
            sys.stdout.buffer.flush()
        else:
            result.save(path, rank, audio_format=order.audio_format)
        line = report(order, result, rank, path, latency_in_s)
        tqdm.write(
            json.dumps(line) if as_json else report_text(line),
            file=sys.stderr if path == STANDARD_OUTPUT else sys.stdout,
        )


def _complain(message: str) -> None:
    tqdm.write(f"audioldm2: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

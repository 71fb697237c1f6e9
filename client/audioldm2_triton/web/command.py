"""`audioldm2 web`: serves the page until it is stopped."""

import argparse
import asyncio
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from audioldm2_triton import contract
from audioldm2_triton.aio import AsyncAudioLDM2Client
from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.plot import require_matplotlib
from audioldm2_triton.server_info import ServerInfo
from audioldm2_triton.transport.endpoint import DEFAULT_URL
from audioldm2_triton.web.gallery import STYLE

NAME: Final = "web"
DEFAULT_PORT: Final = 7860  # the usual one of Gradio's pages


def build_web_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"audioldm2 {NAME}",
        description="Opens a page to generate and listen on, in a browser. Ctrl-C ends it.",
        epilog="Whoever can open the page can use the server, with your API key if you have one.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", default=DEFAULT_URL, help="the server; default: %(default)s")
    parser.add_argument("--model", default=contract.ENSEMBLE, help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="where the page listens; default: this machine only")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: %(default)s")
    return parser


def run_web(argv: Sequence[str]) -> NoReturn:
    """Serves the page until SIGINT or SIGTERM, as `KeyboardInterrupt`.

    Raises `ImportError`, which says what to install, `OSError` for a port that is taken, and `AudioLDM2Error` if there
    is no server.
    """
    arguments = build_web_parser().parse_args(argv)
    require_matplotlib()
    try:
        from audioldm2_triton.web.page import build_page
    except ImportError:
        raise ImportError("the page needs gradio: pip install gradio") from None
    info = asyncio.run(_info(arguments.url, arguments.model))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="audioldm2-web-") as folder:
        client = AsyncAudioLDM2Client(arguments.url, model=arguments.model)
        page = build_page(client, info, arguments.url, arguments.model, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                run_history=False,
                footer_links=[],
                allowed_paths=[folder],
                css=STYLE,
            )
        except OSError:
            raise OSError(f"--port: got {arguments.port} but expected a free one of {arguments.host}") from None
        try:
            print(f"ready: {address}", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    raise AssertionError  # an event that nobody sets


async def _info(url: str, model: str) -> ServerInfo:
    async with AsyncAudioLDM2Client(url, model=model) as client:
        info = await client.server_info()
    if not info.serves_stream:
        raise UnavailableError(f"{url}: got no model {contract.stream_of(model)} but expected one, for the page")
    return info

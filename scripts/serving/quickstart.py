"""`scripts/quickstart`: one generation through a real server, from nothing."""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from audioldm2_triton import AudioLDM2Client, AudioLDM2Error
from audioldm2_triton.files import check_writable
from audioldm2_triton.terminal import escape_unprintable
from project import DEMO_CHECKPOINT, ROOT
from serving.local_server import local_server
from serving.server_error import ServerError

AUDIO: Final = "out.wav"
PICTURE: Final = "out.png"


def main() -> int:
    escape_unprintable()
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description="Writes out.wav and out.png.")
    parser.add_argument("prompt", nargs="?", default="A church bell rings slowly")
    parser.add_argument("--out", type=Path, default=ROOT, help="a folder (default: that of the repository)")
    arguments = parser.parse_args()
    try:
        # Before minutes are spent on a sound that cannot be written.
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in (AUDIO, PICTURE):
            check_writable(arguments.out / name)
        with tempfile.TemporaryDirectory() as directory:
            print("starting the server", file=sys.stderr)
            with local_server(DEMO_CHECKPOINT, Path(directory) / "log") as server:
                _generate(arguments.prompt, server.grpc_url, arguments.out)
    except (AudioLDM2Error, ServerError, OSError) as error:
        print(f"scripts/quickstart: {error}", file=sys.stderr)
        return 1
    return 0


def _generate(prompt: str, url: str, out: Path) -> None:
    with AudioLDM2Client(url) as client:
        client.server_info()
        start = time.perf_counter()
        result = client.generate(prompt, seed=0, return_scores=True)
        latency = time.perf_counter() - start
    audio, image = out / AUDIO, out / PICTURE
    result.save(audio)
    result.plot(image)
    assert result.scores is not None  # asked for
    print(
        f"{audio.name}, {image.name}: {result.duration_in_s:.2f} s of audio in {latency:.2f} s"
        f" (real-time factor {latency / result.duration_in_s:.3f}),"
        f" seed {result.seed}, score {result.scores[0]:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())

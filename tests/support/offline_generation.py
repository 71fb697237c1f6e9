"""Serves a checkpoint and generates where there is no network. Runs in a network namespace of its own.

Arguments: the checkpoint, a folder to write to, options for `scripts/serve`. The folder gets the server's log and the
audio, `audio.npy`. Prints the checkpoint's name as the server tells it.
"""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from audioldm2_pipeline import Call, generate
from audioldm2_triton import AudioLDM2Client
from serving.local_server import local_server

CALL = Call("Rain on a tin roof", "low quality", 0.2, 3, 3.5, seed=7)


def run(checkpoint: Path, folder: Path, *options: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in ("192.0.2.1", "1.1.1.1"):
        with socket.socket() as probe:
            if not probe.connect_ex((address, 443)):
                raise RuntimeError(f"{address} can be reached: the network is not cut")
    with (
        local_server(checkpoint, folder / "log", *options) as server,
        AudioLDM2Client(server.grpc_url) as client,
    ):
        print(client.server_info().checkpoint)
        np.save(folder / "audio.npy", generate(client, CALL).audio)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

"""`scripts/replicas`: servers on this machine behind one address, by Envoy, until it is stopped.

Each request goes to the server that has fewest, as long as its health address says that it is ready. What
docker/replicas does in containers.
"""

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Final

from project import CACHE
from replication.replica import make_replicas, replicated, wait_until_all_are_ready
from serving.server_error import ServerError

_LOOK_INTERVAL_IN_S: Final = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/replicas", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a directory")
    parser.add_argument("--servers", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="of all together (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, help="of all together (default: %(default)s)")
    parser.add_argument("--logs", type=Path, default=CACHE / "replicas", help="a folder (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="after --: for scripts/serve of each")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    replicas = make_replicas(arguments.checkpoint, arguments.servers, arguments.logs, arguments.options)
    log = arguments.logs / "envoy.log"
    try:
        with (
            contextlib.suppress(KeyboardInterrupt),
            replicated(replicas, log, arguments.grpc_port, arguments.http_port) as balancer,
        ):
            print(f"ready: {' '.join(balancer.urls)}; Envoy's admin page on {balancer.admin_port}", flush=True)
            for replica in replicas:
                grpc = replica.running.grpc_url
                print(f"  {grpc}, health {replica.running.health_port}, process {replica.running.process.pid}")
            while True:
                # What has ended is started anew; so stopping one after the other is a rolling restart.
                wait_until_all_are_ready(replicas, balancer)
                time.sleep(_LOOK_INTERVAL_IN_S)
    except ServerError as error:
        print(f"scripts/replicas: {error}", file=sys.stderr)
        return 1
    return 0


def _leave(_number: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the servers are draining
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

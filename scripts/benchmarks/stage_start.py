"""One start of all stages in a process of its own: prints the seconds from here to the first audio, as JSON."""

import argparse
import json
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help="as JSON")
    parser.add_argument("--audio-length-in-s", type=float, required=True)
    arguments = parser.parse_args()
    start = time.perf_counter()
    from audioldm2_triton.server.settings import Settings
    from benchmarks.workload import make_rows
    from in_process.stages import running_stages

    with running_stages(Settings(**json.loads(arguments.settings))) as stages:
        ready = time.perf_counter()
        stages.generate(make_rows(1, arguments.audio_length_in_s, 2)[0])
        first = time.perf_counter()
    print(json.dumps({"ready_s": ready - start, "first_s": first - ready}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

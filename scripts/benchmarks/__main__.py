"""`scripts/benchmark`: measurements, each one command, each with its rows in a CSV file."""

import argparse
import sys
from importlib import import_module
from typing import Final

# A command's module is imported when it is asked for: not every machine has what all of them need.
COMMANDS: Final = {
    "coldstart": "from the start to ready, with and without compiled code that was kept",
    "gpu": "everything that needs no server, in calls of minutes that continue each other",
    "joining": "a short request that joins a long one in flight",
    "latency": "one request alone: the pipeline, the guide's recipe, the stages, the server",
    "ledger": "what each change to the UNet's step gains",
    "load": "perf_analyzer over concurrency and Poisson rates: the engine, dynamic batching, one by one",
    "memory": "the most memory that each stage holds, by the length of the audio",
    "precision": "how exact float32 is on a CPU, beside the reference pipeline's own float32",
    "stages": "time and arithmetic of each stage, beside the pipeline's, and what Triton adds",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chosen = next((argument for argument in sys.argv[1:] if argument in COMMANDS), None)
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description)
        if name == chosen:
            module = import_module(f"benchmarks.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(measure=module.measure)
    arguments = parser.parse_args()
    arguments.measure(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

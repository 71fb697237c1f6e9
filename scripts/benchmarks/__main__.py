"""`scripts/benchmark`: measurements, each one command, each with its rows in a CSV file."""

import sys
from typing import Final

from command_line import measure

COMMANDS: Final = {
    "background": "what a batch job costs those who wait for an answer, and what they cost it",
    "coldstart": "from the start to ready, with and without compiled code that was kept",
    "equal": "requests that are all alike, by each policy: what least laxity costs where it can gain nothing",
    "formats": "the size of an answer and what it costs: floats and files, over gRPC and HTTP",
    "goodput": "requests that differ in everything, over multiples of the capacity, four ways in turns",
    "gpu": "everything that needs no server, in calls of minutes that continue each other",
    "joining": "a short request that joins a long one in flight",
    "latency": "one request alone: the pipeline, the guide's recipe, the stages, the server",
    "ledger": "what each change to the UNet's step gains",
    "load": "perf_analyzer over concurrency and Poisson rates: the engine, dynamic batching, one by one",
    "loadtest": "perf_analyzer against a server that runs, anywhere; as scripts/loadtest",
    "memory": "the most memory that each stage holds, by the length of the audio",
    "precision": "how exact float32 is on a CPU, beside the reference pipeline's own float32",
    "stages": "time and arithmetic of each stage, beside the pipeline's, and what Triton adds",
    "timeline": "a picture and a trace of forwards that mix requests which differ in everything",
}


if __name__ == "__main__":
    modules = {name: (f"benchmarks.commands.{name}", text) for name, text in COMMANDS.items()}
    sys.exit(measure("scripts/benchmark", __doc__, modules))

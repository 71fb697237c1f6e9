"""What `scripts/benchmark memory` tells of a server: the peaks of its processes, apart and together."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.server.settings import Settings
from benchmarks.commands.memory import measure_served
from benchmarks.measurement import Record, read_records
from benchmarks.run import Run
from benchmarks.server_memory import watching
from benchmarks.workload import make_rows
from serving.local_server import LocalServer

MIB = 2**20
BLOCK = 200 * MIB


def test_what_is_freed_again_counts_while_it_was_held() -> None:
    with watching({"this": os.getpid()}) as highest:
        before = highest.at_once
        block = np.ones(BLOCK, np.uint8)
        highest.sample()
        del block
    assert highest.at_once - before > 0.95 * BLOCK
    assert highest.each["this"] >= highest.at_once


def test_a_request_has_a_row_for_each_process_and_one_for_all(
    server: LocalServer, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    record = Record("memory", "", "CPU", "float32", torch.__version__, "tiny")
    run = Run(Settings(str(tiny_checkpoint)), torch.device("cpu"), torch.float32, tmp_path / "rows.csv", record)
    (request,) = make_rows(1, 0.64, 1)
    with AudioLDM2Client(server.grpc_url) as client:
        client.server_info()
        records = measure_served(run, server, client, request, streamed=False)
        offloading = replace(run, settings=replace(run.settings, offload="on"))
        streamed = measure_served(offloading, server, client, request, streamed=True)
    peaks = {record.path: record.peak_memory_mib for record in records if record.peak_memory_mib is not None}
    stages = ("text_conditioning", "denoiser", "decoder")
    assert set(peaks) == {*stages, "audioldm2_stream", "tritonserver", "all", "all at once"}
    assert min(peaks[stage] for stage in stages) > 100
    assert 0 < peaks["all at once"] <= peaks["all"]
    assert {record.path for record in streamed} >= {"all at once, offload", "first chunk, offload", "answer, offload"}
    assert [record.path for record in read_records(run.csv)] == [record.path for record in (*records, *streamed)]

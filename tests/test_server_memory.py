"""What `scripts/benchmark memory` tells of a server: the peaks of its processes, apart and together."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.server.settings import Settings
from benchmarks.commands.memory import measure_served
from benchmarks.measurement import Row, read_rows
from benchmarks.run import Setting
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
    row = Row("memory", "", "CPU", "float32", torch.__version__, "tiny")
    setting = Setting(Settings(str(tiny_checkpoint)), torch.device("cpu"), torch.float32, tmp_path / "rows.csv", row)
    (request,) = make_rows(1, 0.64, 1)
    with AudioLDM2Client(server.grpc_url) as client:
        client.server_info()
        rows = measure_served(setting, server, client, request, streamed=False)
        offloading = replace(setting, settings=replace(setting.settings, offload="on"))
        streamed = measure_served(offloading, server, client, request, streamed=True)
    peaks = {row.path: row.peak_memory_mib for row in rows if row.peak_memory_mib is not None}
    stages = ("text_conditioning", "denoiser", "decoder")
    assert set(peaks) == {*stages, "audioldm2_stream", "tritonserver", "all", "all at once"}
    assert min(peaks[stage] for stage in stages) > 100
    assert 0 < peaks["all at once"] <= peaks["all"]
    assert {row.path for row in streamed} >= {"all at once, offload", "first chunk, offload", "answer, offload"}
    assert [row.path for row in read_rows(setting.csv)] == [row.path for row in (*rows, *streamed)]

"""Generates with every scheduler, and builds the tables of every spacing of timesteps, in this process.

Runs in any environment that has the libraries of a server. Argument: a checkpoint. The last line on standard output is
a report.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np

from audioldm2_triton.contract import MIN_AUDIO_LENGTH_IN_S, SCHEDULERS
from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.settings import TIMESTEP_SPACINGS, Settings
from in_process.stages import running_stages
from project import add_stages_to_path

add_stages_to_path()
from denoiser_stage import load_schedule_tables  # noqa: E402

STEPS: Final = (1, 2, 11, 50)


def run(checkpoint: str) -> None:
    rows = [
        GenerationRow("rain", "", MIN_AUDIO_LENGTH_IN_S, steps, 3.5, 1, 0, scheduler, False)
        for scheduler, steps in product(SCHEDULERS, STEPS)
    ]
    with running_stages(Settings(checkpoint)) as stages, ThreadPoolExecutor(len(rows)) as pool:
        audio = list(pool.map(stages.generate, rows))
    for spacing in ("", *TIMESTEP_SPACINGS):
        tables = load_schedule_tables(Path(checkpoint), spacing)
        for scheduler, steps in product(SCHEDULERS, STEPS):
            tables.get(scheduler, steps)
    print(
        json.dumps(
            {
                "numpy": np.__version__,
                "audio": sum(bool(np.isfinite(each).all() and each.any()) for each in audio),
                "tables": (1 + len(TIMESTEP_SPACINGS)) * len(rows),
            }
        )
    )


if __name__ == "__main__":
    run(sys.argv[1])

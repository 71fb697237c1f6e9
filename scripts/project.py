"""Where things lie in this repository."""

import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CACHE: Final = ROOT / ".cache"
DEMO_CHECKPOINT: Final = ROOT / "scripts" / "demo_checkpoint" / "checkpoint"
STAGES: Final = tuple(sorted((ROOT / "model_repository").glob("*/1")))


def add_stages_to_path() -> None:
    """Makes the modules of all stages importable by name, as they are in Triton's Python processes."""
    sys.path += [str(folder) for folder in STAGES if str(folder) not in sys.path]

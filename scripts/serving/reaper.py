"""Removes what a run of `scripts/serve` has left once its process has ended, which closes standard input, a pipe."""

import sys
from pathlib import Path

from serving.run_directory import remove_run

if __name__ == "__main__":
    sys.stdin.read()
    remove_run(Path(sys.argv[1]))

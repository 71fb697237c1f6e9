"""The virtual environments in which a server and a client run as users have them; the tests run in another."""

import subprocess
import sys
from functools import cache
from pathlib import Path

from project import ROOT


@cache
def environment(name: str) -> Path:
    """The folder of an environment, by the name that scripts/environment has for it."""
    if name == "tools":
        return Path(sys.prefix)  # as it is: making it anew would take it away under the tests
    script = '. scripts/environment; ensure_environment "$1"; echo "$environment"'
    made = subprocess.run(
        ["bash", "-euc", script, "bash", name], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(made.stdout.rstrip("\n"))


def python(name: str) -> str:
    """The interpreter of an environment."""
    return str(environment(name) / "bin" / "python3")

"""`scripts/fuzz`: what a server must survive, each one command with a verdict."""

import sys
from typing import Final

from command_line import measure

COMMANDS: Final = {
    "fuzz": "hostile requests by every way into a server",
}


if __name__ == "__main__":
    modules = {name: (f"trials.{name}", text) for name, text in COMMANDS.items()}
    sys.exit(measure("scripts", __doc__, modules))

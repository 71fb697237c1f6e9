"""What a server must survive: `scripts/chaos`, `drains`, `failover`, `fuzz`, `soak`; each a command with a verdict."""

import sys
from typing import Final

from command_line import measure

COMMANDS: Final = {
    "chaos": "stages killed and stopped under load, over a bad network",
    "drains": "SIGTERM at random moments, under load and during the start",
    "failover": "two servers behind one address, killed and restarted in turn under load",
    "soak": "mixed load for as long as wanted, part of it cancelled, late or cut off",
    "fuzz": "hostile requests by every way into a server",
}


if __name__ == "__main__":
    modules = {name: (f"trials.{name}", text) for name, text in COMMANDS.items()}
    sys.exit(measure("scripts", __doc__, modules))

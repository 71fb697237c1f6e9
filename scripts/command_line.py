"""The command line of a script with one module for each of its measurements."""

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module


def measure(prog: str, description: str | None, commands: Mapping[str, tuple[str, str]]) -> int:
    """Runs the measurement that the command line names: `add_arguments` and `measure` of its module.

    `commands` has the module of each command, and its help. Only the module that is asked for is imported: not every
    machine has what all of them need.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    chosen = next((argument for argument in sys.argv[1:] if argument in commands), None)
    for name, (path, text) in commands.items():
        command = subparsers.add_parser(name, help=text)
        if name == chosen:
            module = import_module(path)
            module.add_arguments(command)
            command.set_defaults(measure=module.measure)
    arguments = parser.parse_args()
    arguments.measure(arguments)
    return 0

"""`scripts/sound-quality`: what a checkpoint sounds like, and what the server's options do to the sound."""

import argparse
import sys

from sound_quality import contact_sheet, judgement, sampling, seams


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sound-quality", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, description in (
        ("judge", judgement, "a checkpoint behind a real server, by a judge that knows only sounds"),
        ("sheet", contact_sheet, "spectrograms of generated sounds beside the library's, as a PNG"),
        ("seams", seams, "whether the seams between windows of long audio can be heard, by spectral flux"),
        ("sampling", sampling, "what other timesteps and guidance in a part of the steps lose"),
    ):
        command = commands.add_parser(name, help=description)
        module.add_arguments(command)
        command.set_defaults(measure=module.measure)
    arguments = parser.parse_args()
    arguments.measure(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

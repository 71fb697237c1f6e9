"""`scripts/sound-quality`: what a checkpoint sounds like, and what the server's options do to the sound."""

import sys
from typing import Final

from command_line import measure

COMMANDS: Final = {
    "judge": ("sound_quality.judgement", "a checkpoint behind a real server, by a judge that knows only sounds"),
    "sheet": ("sound_quality.contact_sheet", "spectrograms of generated sounds beside the library's, as a PNG"),
    "seams": ("sound_quality.seams", "whether the seams between windows of long audio can be heard, by spectral flux"),
    "sampling": ("sound_quality.sampling", "what other timesteps and guidance in a part of the steps lose"),
}

if __name__ == "__main__":
    sys.exit(measure("scripts/sound-quality", __doc__, COMMANDS))

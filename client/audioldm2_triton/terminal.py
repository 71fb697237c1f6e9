"""Makes the standard streams print any text, whatever the encoding of the terminal."""

import io
import sys


def escape_unprintable() -> None:
    """Lets the standard streams escape what their encoding lacks, as `\\\\u6a21`, instead of raising an error.

    A name of a file is no reason to lose the work that was done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

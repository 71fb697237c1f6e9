"""What the command line prints for each file, for tests of it."""

import re
from typing import Final

PROMPT: Final = "rain"
_LINE: Final = re.compile(
    r"(?P<path>\S+)  (?P<length>\d+\.\d\d) s  seed (?P<seed>\d+)  score (?P<score>\S+)  latency \d+\.\d\d s"
)


def report(line: str) -> dict[str, str]:
    match = _LINE.fullmatch(line)
    assert match, line
    return match.groupdict()

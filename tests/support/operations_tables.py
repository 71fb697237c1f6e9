"""The tables of the page for operators."""

import re
from typing import Final

from project import ROOT

OPERATIONS: Final = ROOT / "model_repository" / "OPERATIONS.md"


def first_cells(heading: str) -> list[tuple[str, str]]:
    """The first two cells of each row of the table below a heading."""
    section = OPERATIONS.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, re.MULTILINE)

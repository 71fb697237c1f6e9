"""The pages: links and paths lead somewhere, and the tables of settings and metrics have what the code has."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from audioldm2_triton.server import metric_names
from audioldm2_triton.server.settings import Settings
from operations_tables import first_cells
from project import ROOT

ARCHITECTURE: Final = ROOT / "model_repository" / "ARCHITECTURE.md"
PAGES: Final = (
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "client").glob("*.md")),
    *sorted((ROOT / "docker").rglob("*.md")),
    *sorted((ROOT / "model_repository").glob("*.md")),
)
LINKS: Final = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: str(getattr(value, "name", value)))
def test_links_lead_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def test_the_files_of_the_architecture_exist() -> None:
    named = set(re.findall(r"`([\w./]+\.(?:py|pbtxt|yaml))`", ARCHITECTURE.read_text()))
    folders = [ROOT / folder for folder in ("client", "docker", "model_repository", "scripts", "tests")]
    files = [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert named
    assert {name for name in named if not any(file.endswith(f"/{name}") for file in files)} == set()


def test_all_settings_are_listed_with_their_defaults() -> None:
    listed = dict(first_cells("Settings"))
    assert list(listed) == [field.name for field in fields(Settings)]
    for field in fields(Settings):
        # Where there is none, or an empty one, the page says in words what follows.
        if isinstance(field.default, str | int | float) and field.default:
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert listed[field.name].strip("`") == default, field.name


def test_all_metrics_are_listed() -> None:
    names = {value for name, value in vars(metric_names).items() if name.isupper() and name != "PREFIX"}
    assert {name for name, _ in first_cells("Metrics")} == names

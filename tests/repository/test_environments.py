"""The environments of servers, clients and tests hold what pyproject.toml installs, no more and no less."""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from environments import environment, python
from project import ROOT
from serving import interpreter

PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: Final = {
    "product": ["server", "triton"],
    "client": [],
    "plot": ["plot"],
    "web": ["web"],
    "tools": ["server", "triton", "plot", "dev"],
}
PIP: Final = "pip"  # which installs the others


def installed(folder: Path) -> dict[str, Distribution]:
    site_packages = [str(path) for path in folder.glob("lib/python*/site-packages")]
    return {canonicalize_name(each.name): each for each in distributions(path=site_packages)}


def required(found: dict[str, Distribution], extras: list[str]) -> dict[str, list[Requirement]]:
    """The distributions that the project with these extras brings, directly or not, with what is asked of each."""
    reasons: dict[str, list[Requirement]] = {}
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(f"{PROJECT['name']}[{','.join(extras)}]")]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        reasons.setdefault(name, []).append(requirement)
        assert name in found, f"got no {name} but expected {requirement}"
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                further = [Requirement(text) for text in found[name].requires or ()]
                todo += [each for each in further if not each.marker or each.marker.evaluate({"extra": extra})]
    return reasons


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "web" else []) for name in EXTRAS]
)
def test_what_is_installed_is_what_is_asked_for(name: str) -> None:
    found = installed(environment(name))
    reasons = required(found, EXTRAS[name])
    assert set(found) - {PIP} == set(reasons)
    for distribution, requirements in reasons.items():
        for requirement in requirements:
            assert requirement.specifier.contains(found[distribution].version, prereleases=True), requirement


def test_the_client_is_light() -> None:
    heavy = ("torch", "scipy", "librosa", "matplotlib", "diffusers", "transformers", "pytriton")
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {heavy}))"
    there = [
        subprocess.run([python(name), "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for name in ("client", "tools")
    ]
    assert there == [[], list(heavy)]


# A Python that makes an environment without installing anything: `-m venv FOLDER`, then that one's `-m pip install`.
STAND_IN: Final = """#!/usr/bin/env bash
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"
    cp "$0" "$3/bin/python3"
    echo made >>"$(dirname "$3")/makings"
    ;;
  *" install "*)
    cd "$(dirname "$0")/../lib/python3.11/site-packages"
    mkdir numpy-1.26.4.dist-info
    touch __editable__.audioldm2_triton-0.1.0.pth
    ;;
esac
"""


@dataclass(frozen=True)
class Clone:
    """A project at another place, whose Python installs nothing."""

    root: Path

    def ensure(self, **variables: str) -> Path:
        script = '. "$1/scripts/environment"; ensure_environment client; echo "$environment"'
        own = {"PYTHON": str(self.root / "stand-in"), "XDG_CACHE_HOME": str(self.root.parent / "cache")}
        # An environment that is to be used as it is would be changed here.
        inherited = {name: value for name, value in os.environ.items() if name != "AUDIOLDM2_ENVIRONMENT"}
        variables = {**inherited, **own, **variables}
        command = ["bash", "-euc", script, "bash", self.root]
        return Path(subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout[:-1])

    @property
    def makings(self) -> int:
        return len((self.root / "makings").read_text().splitlines())


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    root = tmp_path / "a clöne"
    (root / "scripts").mkdir(parents=True)
    for path in ("pyproject.toml", "scripts/environment"):
        shutil.copy(ROOT / path, root / path)
    (root / "stand-in").write_text(STAND_IN)
    (root / "stand-in").chmod(0o755)
    return Clone(root)


def test_an_environment_is_made_once(clone: Clone) -> None:
    folder = clone.ensure()
    assert clone.ensure() == folder
    assert clone.makings == 1
    assert folder.resolve() == clone.root / ".venv-client"
    # The blank and the letters of the clone's path are hidden behind a link.
    assert shlex.quote(str(folder)) == str(folder)


def test_an_environment_with_more_is_made_anew(clone: Clone) -> None:
    more = clone.ensure() / "lib" / "python3.11" / "site-packages" / "scipy-1.17.1.dist-info"
    more.mkdir()
    clone.ensure()
    assert clone.makings == 2
    assert not more.exists()


def test_an_environment_with_another_version_is_made_anew(clone: Clone) -> None:
    numpy = clone.ensure() / "lib" / "python3.11" / "site-packages" / "numpy-1.26.4.dist-info"
    numpy.rename(numpy.with_name("numpy-2.0.0.dist-info"))
    clone.ensure()
    assert clone.makings == 2
    assert numpy.exists()


def test_an_environment_is_made_anew_for_other_requirements_only(clone: Clone) -> None:
    clone.ensure()
    project = clone.root / "pyproject.toml"
    project.write_text(project.read_text() + "# of a tool\n")
    clone.ensure()
    assert clone.makings == 1
    project.write_text(project.read_text().replace('"numpy>=', '"numpy>', 1))
    clone.ensure()
    assert clone.makings == 2


def test_an_environment_that_was_moved_is_made_anew(clone: Clone) -> None:
    clone.ensure()
    moved = Clone(clone.root.rename(clone.root.with_name("elsewhere")))
    assert moved.ensure().resolve() == moved.root / ".venv-client"
    assert moved.makings == 2


def test_an_environment_that_was_left_unfinished_is_made_anew(clone: Clone) -> None:
    (clone.ensure() / "state").unlink()
    clone.ensure()
    assert clone.makings == 2


def test_a_given_environment_is_taken_as_it_is(clone: Clone, tmp_path: Path) -> None:
    """As in the image, where user 1000 can write nothing."""
    assert clone.ensure(AUDIOLDM2_ENVIRONMENT=str(tmp_path / "given")) == tmp_path / "given"
    assert not (clone.root / "makings").exists()


def test_a_python_that_does_not_serve_is_refused_with_the_reason(clone: Clone) -> None:
    script = '. "$1/scripts/environment"; ensure_environment client'
    variables = {**os.environ, "PYTHON": "/bin/false"}
    run = subprocess.run(["bash", "-euc", script, "bash", clone.root], env=variables, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("scripts/environment: got no Python that serves but expected 3.11 or 3.12")
    assert "  /bin/false: " in run.stderr


def test_a_python_without_its_library_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_found(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(interpreter.sysconfig, "get_config_var", lambda _: str(tmp_path))
    monkeypatch.setattr(interpreter.ctypes, "CDLL", not_found)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(interpreter.InterpreterError, match=rf"apt-get install libpython{version}\b"):
        interpreter.library_directory()


@pytest.mark.parametrize(("version", "serves"), [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)])
def test_the_versions_of_python_that_serve(
    version: tuple[int, int], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter.sys, "version_info", (*version, 1))
    with nullcontext() if serves else pytest.raises(interpreter.InterpreterError, match=r"expected 3\.11 to 3\.12"):
        interpreter.check_version()

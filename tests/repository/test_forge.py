"""What a forge reads: the workflow runs what CI runs, and versions that stand twice are the same."""

import os
import re
import tomllib
from typing import Any, Final

import yaml

from project import ROOT

PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())


def jobs() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text())["jobs"])


def commands(job: str) -> str:
    return "\n".join(step.get("run", "") for step in jobs()[job]["steps"])


def test_the_workflow_runs_what_ci_runs() -> None:
    assert set(jobs()) == {"test", "audit", "image", "chart"}
    assert ".ci/run" in commands("test").splitlines()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    finder = (ROOT / "scripts" / "environment").read_text()
    offered = set(re.findall(r"[ /]python(3\.\d+)\b", finder.split("for candidate in")[1].split("; do")[0]))
    assert set(jobs()["test"]["strategy"]["matrix"]["python"]) == offered


def test_commands_of_the_workflow_name_files_that_are_there() -> None:
    named = {word for job in jobs() for word in re.findall(r"(?:docker|scripts)/[\w./-]+", commands(job))}
    assert len(named) >= 4
    assert {name for name in named if not (ROOT / name.rstrip("/")).exists()} - {"docker/kubernetes/values/"} == set()


def test_the_chart_is_checked_but_for_what_its_page_explains() -> None:
    skipped = re.search(r"--skip-check (\S+)", commands("chart"))
    assert skipped
    page = (ROOT / "docker" / "kubernetes" / "README.md").read_text()
    assert {f"CKV_{name}" for name in re.findall(r"\b(K8S_\d+)", page)} == set(skipped[1].split(","))


def test_one_version_of_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = (repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit"))
    assert f"ruff=={revision.removeprefix('v')}" in PROJECT["project"]["optional-dependencies"]["dev"]


def test_commands_for_contributors_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:scripts/[a-z-]+|\.ci/run)", page))
    assert named >= {"scripts/lint", "scripts/types", "scripts/test", "scripts/benchmark", ".ci/run"}
    assert {name for name in named if not os.access(ROOT / name, os.X_OK)} == {"scripts/environment"}  # sourced

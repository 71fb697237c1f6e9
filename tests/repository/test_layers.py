"""Which module may import which: no cycle anywhere, and no arrow against the layers."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

from project import ROOT

PACKAGE: Final = ROOT / "client"
STAGES: Final = sorted((ROOT / "model_repository").glob("*/1"))
MAX_LINES: Final = 300


def modules(folder: Path) -> dict[str, Path]:
    """Every module below a folder that is on the path, by its dotted name."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, types_too: bool = True) -> Iterator[str]:
    """The names that a file imports anywhere; those under TYPE_CHECKING only with `types_too`."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (name.name for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                # In the commands under scripts/ a package is one folder, so one dot is its name.
                above = [path.parent.name] if child.level else []
                module = ".".join([*above, *filter(None, [child.module])])
                yield module
                yield from (f"{module}.{name.name}" for name in child.names)
            elif types_too or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
                yield from visit(child)

    yield from visit(ast.parse(path.read_text()))


def arrows(own: Mapping[str, Path]) -> dict[str, set[str]]:
    return {name: {other for other in imports(path) if other in own and other != name} for name, path in own.items()}


def in_server(module: str) -> bool:
    return f"{module}.".startswith("audioldm2_triton.server.")


def is_shared(module: str) -> bool:
    """Whether both sides agree on it; a name out of a module counts as the module."""
    return module.startswith(("audioldm2_triton.contract", "audioldm2_triton.errors", "audioldm2_triton.audio"))


@pytest.mark.parametrize(
    "folder", [PACKAGE, ROOT / "scripts", *STAGES], ids=lambda folder: str(folder.relative_to(ROOT))
)
def test_no_import_cycle(folder: Path) -> None:
    own = modules(folder)
    # The package's own front imports by name, on demand.
    graph = {name: others - {"audioldm2_triton"} for name, others in arrows(own).items() if name != "audioldm2_triton"}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_the_package_has_three_floors() -> None:
    """What a user imports, over how it travels, over what both sides agree on; what stages share stands apart."""
    for name, path in modules(PACKAGE).items():
        used = {other for other in imports(path) if other.startswith("audioldm2_triton.")}
        if in_server(name):
            assert all(in_server(other) or is_shared(other) for other in used), (name, used)
        else:
            assert not any(in_server(other) for other in used), name
            assert not {other.partition(".")[0] for other in imports(path)} & {"torch", "diffusers", "transformers"}
        if name in ("audioldm2_triton.contract", "audioldm2_triton.errors"):
            assert used <= {"audioldm2_triton.errors"}, name
        if name.startswith("audioldm2_triton.audio"):
            assert all(map(is_shared, used)), (name, used)


def test_stages_use_what_is_shared_alone() -> None:
    for stage in STAGES:
        for name, path in modules(stage).items():
            for other in imports(path):
                if other.startswith("audioldm2_triton."):
                    assert in_server(other) or is_shared(other), f"{stage.parent.name}: {name} imports {other}"


def test_only_adapters_know_triton() -> None:
    backend = "triton_python_backend_utils"
    assert {
        str(path.relative_to(ROOT))
        for folder in (PACKAGE, *STAGES)
        for path in modules(folder).values()
        if backend in imports(path)
    } == {
        "client/audioldm2_triton/server/triton_adapter.py",
        "client/audioldm2_triton/server/triton_metrics.py",
        "model_repository/audioldm2_stream/1/model.py",
        "model_repository/denoiser/1/denoiser_metrics.py",
    }


def test_the_denoisers_rooms_are_floors() -> None:
    """The network, below what a step is, below who steps when."""
    denoiser = ROOT / "model_repository" / "denoiser" / "1"
    floors = {"unet": 0, "stepping": 1, "engine": 2}
    own = modules(denoiser)
    for name, others in arrows(own).items():
        for other in others:
            floor, below = (floors.get(module.partition(".")[0], 3) for module in (name, other))
            assert below <= floor, f"{name} imports {other}"


def test_no_file_is_long() -> None:
    paths = [path for folder in (PACKAGE, *STAGES) for path in modules(folder).values()]
    long = {
        str(path.relative_to(ROOT)): count
        for path in paths
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long

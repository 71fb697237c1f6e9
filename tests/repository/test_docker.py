"""What the image and the compose file promise; the image itself is not built here."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from audioldm2_triton.contract import MAX_BATCH_SIZE
from audioldm2_triton.server.settings import Settings, environment_name
from project import ROOT
from serving.server_error import DRAIN_TIMEOUT_IN_S
from serving.supervision import EXIT_TIMEOUT_IN_S

DOCKERFILE: Final = ROOT / "docker" / "Dockerfile"
WORKDIR: Final = "/opt/audioldm2"
CODE: Final = ("client", "model_repository", "scripts")
# Imported only where they are: the container brings its own Triton and needs no plots, no page and no wheel's server.
# The language of GPU kernels comes with torch for CUDA, which is not what is installed here.
NOT_IN_THE_IMAGE: Final = {"triton_python_backend_utils", "pytriton", "matplotlib", "gradio", "triton"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, in order."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def position(name: str, part: str) -> int:
    """Which instruction of this name holds `part`."""
    found = [number for number, (kind, rest) in enumerate(instructions()) if kind == name and part in rest]
    assert len(found) == 1, f"got {len(found)} but expected one {name} with {part!r}"
    return found[0]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in arguments("ENV") for pair in rest.split())


def copied() -> list[str]:
    return [source for rest in arguments("COPY") for source in rest.split()[:-1]]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets `path` into the build: the last pattern decides that matches it or a parent."""
    places = [str(place) for place in (PurePosixPath(path), *PurePosixPath(path).parents)][:-1]
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        depth = None if pattern.startswith("**/") else pattern.count("/")
        if any(
            fnmatchcase(place if depth is not None else place.rpartition("/")[2], pattern.removeprefix("**/"))
            and depth in (None, place.count("/"))
            for place in places
        ):
            sent = line.startswith("!")
    return sent


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    (server,) = (each for each in compose["services"].values() if "profiles" not in each)
    return dict(server)


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def test_hadolint() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_bases_are_releases_whose_readiness_sees_a_dead_process() -> None:
    bases = arguments("FROM")
    assert bases
    for base in bases:
        match = re.fullmatch(r"nvcr\.io/nvidia/tritonserver:(\d\d)\.(\d\d)-py3", base)
        assert match, base
        assert (int(match[1]), int(match[2])) >= (26, 4), base
    assert f"Triton {bases[0].partition(':')[2].removesuffix('-py3')} " in (ROOT / "docker" / "README.md").read_text()


def test_copied_paths_exist_and_are_sent() -> None:
    for source in copied():
        tracked = subprocess.run(["git", "ls-files", "--", source], cwd=ROOT, capture_output=True, text=True)
        assert tracked.stdout, f"{source}: not in the repository"
        for path in tracked.stdout.split():
            assert is_sent(path), f"{path}: .dockerignore keeps it back"
    assert set(CODE) <= set(copied())


@pytest.mark.parametrize(
    "path",
    [
        ".cache/checkpoints/tiny/unet/config.json",
        ".git/config",
        ".venv/bin/python",
        "client/audioldm2_triton.egg-info/PKG-INFO",
        "client/audioldm2_triton/__pycache__/cli.cpython-312.pyc",
        "weights/audioldm2/unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_what_is_not_code_is_not_sent(path: str) -> None:
    assert not is_sent(path)


def image_requirements() -> list[str]:
    """What the Dockerfile's own command lists."""
    (command,) = re.findall(r"python3 requirements\.py ([\w ]*)>", " ".join(arguments("RUN")))
    script = [sys.executable, ROOT / "docker" / "requirements.py", *command.split()]
    listed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_requirements_are_the_project_s_with_the_extra_server() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert image_requirements() == project["dependencies"] + project["optional-dependencies"]["server"]


def with_dependencies(requirements: list[str]) -> set[str]:
    """The names of all distributions that these requirements bring."""
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                further = [Requirement(text) for text in requires(name) or ()]
            except PackageNotFoundError:  # CUDA's, which torch for CPUs goes without
                continue
            todo += [each for each in further if not each.marker or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def imports() -> Iterator[tuple[str, str]]:
    """File and top-level module of every import in what runs in the image."""
    own = {path.stem for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix == ".py" or path.is_dir()}
    files = [
        *ROOT.glob("client/**/*.py"),
        *ROOT.glob("model_repository/*/1/**/*.py"),
        *ROOT.glob("scripts/serving/*.py"),
        *ROOT.glob("scripts/checkpoints/*.py"),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                module = name.partition(".")[0]
                if module not in own | set(sys.stdlib_module_names) | NOT_IN_THE_IMAGE:
                    yield str(file.relative_to(ROOT)), module


def test_what_the_server_imports_is_installed() -> None:
    # The development extras bring more; an import of theirs would work everywhere but in the image.
    installed = with_dependencies(image_requirements())
    distributions = packages_distributions()
    found = list(imports())
    assert "torch" in {module for _, module in found}
    for file, module in found:
        bringing = {canonicalize_name(name) for name in distributions.get(module, ())}
        assert bringing & installed, f"{file} imports {module}, which is not installed in the image"


def test_a_change_of_the_code_does_not_install_torch_again() -> None:
    torch = position("RUN", "--requirement")
    for folder in CODE:
        assert position("COPY", folder) > torch
    assert "--no-deps" in instructions()[position("RUN", "--editable")][1]


def test_the_build_fails_without_a_compiler_or_with_torch_for_cpus() -> None:
    check = position("RUN", "torch.compile")
    assert check > position("RUN", "--requirement")
    assert "assert torch.version.cuda" in instructions()[check][1]
    assert "||" not in instructions()[check][1]


def test_no_package_lists_stay() -> None:
    for command in arguments("RUN"):
        if "apt-get update" in command:
            assert command.endswith("rm -rf /var/lib/apt/lists/*")


def test_the_user_can_read_what_a_clone_with_a_restrictive_umask_sends() -> None:
    (_, command) = instructions()[position("RUN", "chmod --recursive a+rX")]
    readable = set(command.partition("chmod --recursive a+rX")[2].split())
    assert {path for path in copied() if path != "docker/requirements.py"} <= readable
    assert position("RUN", "chmod --recursive a+rX") > max(position("COPY", folder) for folder in CODE)


def test_user() -> None:
    assert arguments("USER") == ["1000:1000"]
    assert position("USER", "1000") > max(number for number, (name, _) in enumerate(instructions()) if name == "RUN")


def test_entry_point() -> None:
    (entry_point,) = map(json.loads, arguments("ENTRYPOINT"))
    assert entry_point[1:] == ["--host=0.0.0.0"]  # the loopback of a container reaches nobody
    script = ROOT / PurePosixPath(entry_point[0]).relative_to(WORKDIR)
    assert os.access(script, os.X_OK)
    assert arguments("WORKDIR") == [WORKDIR]
    assert arguments("STOPSIGNAL") == ["SIGTERM"]


def test_health_check() -> None:
    (check,) = arguments("HEALTHCHECK")
    options, _, command = check.partition(" CMD ")
    assert json.loads(command)[-1] == "http://127.0.0.1:8003/ready"
    assert "--fail" in json.loads(command)  # an answer of 400 is no health
    assert json.loads(command)[1:3] == ["--noproxy", "*"]  # Docker passes the host's http_proxy on
    period = re.search(r"--start-period=(\w+)", options)
    assert period
    assert seconds(period[1]) >= 600  # compilation


def test_environment() -> None:
    environment = image_environment()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["AUDIOLDM2_CHECKPOINT"] == "/checkpoint"
    assert environment["PATH"].startswith(f"{WORKDIR}/.venv/bin:")  # where Triton's stub takes its interpreter from
    assert environment["AUDIOLDM2_ENVIRONMENT"] == f"{WORKDIR}/.venv"  # user 1000 can install nothing
    known = {environment_name(field.name) for field in fields(Settings)} | {"AUDIOLDM2_ENVIRONMENT"}
    assert {name for name in environment if name.startswith("AUDIOLDM2_")} <= known


def test_compose_passes_every_setting(service: dict[str, Any]) -> None:
    # As the shell has them, but for the checkpoint, which there is a path of the host.
    expected: dict[str, str | None] = {environment_name(field.name): None for field in fields(Settings)}
    image = image_environment()
    expected["AUDIOLDM2_CHECKPOINT"] = image["AUDIOLDM2_CHECKPOINT"]
    assert service["environment"] == expected, "docker/compose.yaml: environment"


def test_compose_mounts(service: dict[str, Any]) -> None:
    mounts = {mount["target"]: mount for mount in service["volumes"]}
    assert mounts["/checkpoint"]["read_only"] is True
    assert mounts["/checkpoint"]["bind"]["create_host_path"] is False
    (cache,) = (target for target, mount in mounts.items() if mount["type"] == "volume")
    environment = image_environment()
    assert cache == f"{environment['HOME']}/.cache"  # of scripts/serve and of the libraries
    for name, path in environment.items():
        if name.endswith(("CACHE_DIR", "CACHE_PATH")):
            assert path.startswith(f"{cache}/"), name
    # A new volume takes its owner from the image.
    assert '"$HOME/.cache"' in instructions()[position("RUN", "--owner=1000")][1]


def test_compose_has_room_for_the_largest_request(service: dict[str, Any]) -> None:
    limits = Settings("").limits
    sampling_rate, float_size = 16_000, 4
    largest = (
        MAX_BATCH_SIZE * limits.max_num_waveforms_per_prompt * limits.max_audio_length_in_s * sampling_rate * float_size
    )
    assert int(service["shm_size"].removesuffix("gb")) << 30 >= 2 * largest  # from the decoder, and beside it another


def test_compose_confines_the_server(service: dict[str, Any]) -> None:
    assert service["user"] == "1000:1000"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
    (tmpfs,) = service["tmpfs"]
    assert tmpfs.startswith("/tmp:")
    assert "exec" in tmpfs.partition(":")[2].split(",")


def test_compose_runs_the_server(service: dict[str, Any]) -> None:
    build = ROOT / "docker" / service["build"]["context"]
    assert build.resolve() / service["build"]["dockerfile"] == DOCKERFILE
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    exposed = arguments("EXPOSE")[0].split()
    assert service["ports"] == [f"{port}:{port}" for port in exposed]
    assert "test" not in service["healthcheck"]  # the image's
    assert seconds(service["healthcheck"]["start_period"]) >= 600
    assert service["restart"] == "unless-stopped"


def test_compose_waits_for_running_requests(service: dict[str, Any]) -> None:
    assert service["init"] is True  # process 1 would ignore SIGTERM until scripts/serve has its handler
    assert seconds(service["stop_grace_period"]) > DRAIN_TIMEOUT_IN_S + EXIT_TIMEOUT_IN_S

"""`scripts/serve`: a Triton server on this repository, in the foreground."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final

from audioldm2_triton.server.settings import (
    ENVIRONMENT_PREFIX,
    Settings,
    SettingsError,
    environment_name,
    read_settings,
)
from serving.installation import InstallationError, find_triton
from serving.plain_paths import PlainPathError, plain_directory
from serving.repository import write_repository
from serving.supervision import EXIT_TIMEOUT_IN_S, ServerError, check_ports_free, run_server

SCRIPTS: Final = Path(__file__).resolve().parent.parent
MODEL_REPOSITORY: Final = SCRIPTS.parent / "model_repository"
DEFAULT_CACHE: Final = "~/.cache/audioldm2-triton"
_NAME: Final = re.compile(r"[A-Za-z]\w*", re.ASCII)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Serves AudioLDM 2 in the foreground. Each setting can also be given in the environment, as "
        "AUDIOLDM2_ followed by its name in capitals.",
    )
    for field in fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, default="", help=field.metadata["help"])
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="another checkpoint with the same settings; its models are NAME_audioldm2, NAME_audioldm2_stream and so "
        "on; may be repeated",
    )
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument(
        "--cache-dir", default=DEFAULT_CACHE, help=f"where hub checkpoints are stored (default: {DEFAULT_CACHE})"
    )
    parser.add_argument("triton_arguments", nargs="*", help="after --: more arguments for tritonserver")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    ports = {
        "--http-port": arguments.http_port,
        "--grpc-port": arguments.grpc_port,
        "--metrics-port": arguments.metrics_port,
    }
    try:
        check_ports_free(ports)
        given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
        further = _further_checkpoints(arguments.also)
        cache = Path(arguments.cache_dir).expanduser()
        settings = {"": read_settings(_with_local_checkpoint(given, cache, "--checkpoint"), {})}
        for prefix, checkpoint in further.items():
            of_checkpoint = _with_local_checkpoint({**given, "checkpoint": checkpoint}, cache, "--also")
            settings[prefix] = read_settings(of_checkpoint, {})
        with plain_directory() as directory:
            _serve(settings, directory, ports, arguments.triton_arguments)
    except (SettingsError, ServerError, InstallationError, PlainPathError, OSError) as error:
        print(f"scripts/serve: {error}", file=sys.stderr)
        return 1
    return 0


def _further_checkpoints(given: Sequence[str]) -> dict[str, str]:
    """Each checkpoint by the prefix of its models' names. Raises `SettingsError`."""
    checkpoints: dict[str, str] = {}
    for text in given:
        name, _, checkpoint = text.partition("=")
        if not _NAME.fullmatch(name) or not checkpoint or f"{name}_" in checkpoints:
            expected = "NAME=CHECKPOINT, with a unique name of letters, digits and _"
            raise SettingsError(f"--also: got {text!r} but expected {expected}")
        checkpoints[f"{name}_"] = checkpoint
    return checkpoints


def _with_local_checkpoint(given: dict[str, str], cache: Path, option: str) -> dict[str, str]:
    """Returns the settings as text, from the command line or the environment, with a verified local checkpoint."""
    resolved = {name: value or os.environ.get(environment_name(name), "") for name, value in given.items()}
    checkpoint = resolved["checkpoint"]
    if not checkpoint:
        raise SettingsError(f"{option}: got nothing but expected a directory or a hub id")
    path = Path(checkpoint).expanduser()
    if not path.exists() and checkpoint.count("/") == 1 and not checkpoint.startswith((".", "~", "/")):
        path = cache / checkpoint
        if not path.exists():
            _run_checkpoint_command(option, "fetch", checkpoint, "--out", str(path))
    if not path.is_dir():
        raise SettingsError(f"{option}: got {checkpoint!r} but expected a directory or a hub id")
    _run_checkpoint_command(option, "verify", str(path))
    return {**resolved, "checkpoint": str(path.resolve())}


def _run_checkpoint_command(option: str, *arguments: str) -> None:
    """Runs it in a separate process, so that the memory of its imports is free again when the server runs."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-m", "checkpoints", *arguments]
    # Standard output belongs to this command; progress bars and faults go to standard error.
    if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
        raise ServerError(f"{option}: {' '.join(arguments[:2])} failed, see above")


def _serve(
    settings: Mapping[str, Settings], run_directory: Path, ports: dict[str, int], triton_arguments: list[str]
) -> None:
    """Runs a server with one set of models for each entry of `settings`, whose key is the prefix of their names."""
    triton = find_triton(run_directory)
    repository = run_directory / "models"
    for prefix, of_checkpoint in settings.items():
        write_repository(MODEL_REPOSITORY, repository, of_checkpoint, prefix)
    # The settings are in the configurations now; the environment would override them.
    environment = {name: value for name, value in triton.environment.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    # Idle OpenMP threads must not spin, because the stages' processes share the cores (ten times slower otherwise).
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The progress bars of the libraries that load the weights do not belong in a server's log.
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment.setdefault("DIFFUSERS_VERBOSITY", "error")
    command = [
        str(triton.binary),
        *triton.arguments,
        f"--model-repository={repository}",
        f"--http-port={ports['--http-port']}",
        f"--grpc-port={ports['--grpc-port']}",
        f"--metrics-port={ports['--metrics-port']}",
        "--disable-auto-complete-config",
        "--model-control-mode=none",
        "--backend-config=python,stub-timeout-seconds=600",  # a busy machine may take minutes to import torch
        # Calls of a stage by `audioldm2_stream` hold two threads each until they are answered.
        "--backend-config=python,thread-pool-size=256",
        f"--exit-timeout-secs={EXIT_TIMEOUT_IN_S}",
        *triton_arguments,
    ]
    run_server(command, environment, ports["--http-port"], ports["--metrics-port"], lambda: _report_ready(ports))


def _report_ready(ports: dict[str, int]) -> None:
    print(
        f"ready: grpc://localhost:{ports['--grpc-port']} http://localhost:{ports['--http-port']}"
        f" metrics http://localhost:{ports['--metrics-port']}/metrics",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

"""`scripts/serve`: a Triton server on this repository, in the foreground."""

import argparse
import compileall
import logging
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final

from audioldm2_triton.contract import ENSEMBLE
from audioldm2_triton.server import entrance
from audioldm2_triton.server.request_record import TRACEPARENT
from audioldm2_triton.server.settings import (
    ENVIRONMENT_PREFIX,
    Settings,
    SettingsError,
    environment_name,
    misspelt_variables,
    read_settings,
    resolve_compile,
    resolve_device,
    resolve_dtype,
)
from audioldm2_triton.terminal import escape_unprintable
from audioldm2_triton.transport.endpoint import API_KEY_HEADER, API_KEY_VARIABLE
from serving.checkpoint_directory import SCRIPTS, local_checkpoint, verify_checkpoint
from serving.diagnosis import Patience, RestartLimit
from serving.health import Health, health_server
from serving.installation import InstallationError, find_triton
from serving.model_control import models_may_change
from serving.plain_paths import PlainPathError, with_plain_folders
from serving.repository import write_repository
from serving.run_directory import run_directory
from serving.server_error import DRAIN_TIMEOUT_IN_S, ServerError
from serving.supervision import (
    EXIT_TIMEOUT_IN_S,
    ServerCommand,
    StopSignals,
    check_ports_free,
    run_server,
)

MODEL_REPOSITORY: Final = SCRIPTS.parent / "model_repository"
DEFAULT_CACHE: Final = "~/.cache/audioldm2-triton"
_NAME: Final = re.compile(r"[A-Za-z]\w*", re.ASCII)
# Where the supervisor looks for the server, and what it says instead of Triton's own option.
_SUPERVISED: Final = {
    **dict.fromkeys(("http-address", "grpc-address", "metrics-address"), "--host"),
    **{f"{name}-port": f"--{name}-port" for name in ("http", "grpc", "metrics")},
    **dict.fromkeys(("allow-http", "allow-metrics"), "HTTP and metrics, for the supervisor"),
}
# Triton's interfaces that change the server, or read its memory and its files.
_RESTRICTED: Final = "model-repository,shared-memory,trace,logging"
_GUARDED: Final = "inference,metadata,model-config,statistics"
_KEEPALIVE_IN_MS: Final = 10_000
_OTHER_VARIABLES: Final = (API_KEY_VARIABLE, entrance.FOLDER_VARIABLE, "AUDIOLDM2_ENVIRONMENT")


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
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all (default: this machine only)"
    )
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument(
        "--health-port", type=int, default=8003, help="/live and /ready, as the supervisor sees the server (8003)"
    )
    parser.add_argument(
        "--admin-key",
        default="",
        help="the value of the header `admin-key` without which the endpoints for repositories, shared memory, traces "
        "and logging refuse (default: a random one, so that nobody may)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY_VARIABLE, ""),
        help=f"the value of the header `{API_KEY_HEADER}` without which requests are refused (default: "
        f"{API_KEY_VARIABLE} of the environment; otherwise everybody may)",
    )
    parser.add_argument(
        "--drain-timeout-in-s",
        type=float,
        default=DRAIN_TIMEOUT_IN_S,
        help=f"how long requests may finish after SIGTERM (default: {DRAIN_TIMEOUT_IN_S:g})",
    )
    parser.add_argument(
        "--stall-timeout-in-s",
        type=float,
        default=Patience.stalled_in_s,
        help="after how long without a step, with waveforms in flight, or without progress in another stage, "
        f"the server is restarted; longer than the longest step and decoding (default: {Patience.stalled_in_s:g})",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=RestartLimit.count,
        help=f"within ten minutes, after which it gives up (default: {RestartLimit.count})",
    )
    parser.add_argument(
        "--max-restart-delay-in-s",
        type=float,
        default=RestartLimit.longest_delay_in_s,
        help="the delay before a restart doubles each time within ten minutes, up to this "
        f"(default: {RestartLimit.longest_delay_in_s:g})",
    )
    parser.add_argument(
        "--cache-dir",
        default=DEFAULT_CACHE,
        help=f"where hub checkpoints are stored, and which were verified (default: {DEFAULT_CACHE})",
    )
    parser.add_argument("triton_arguments", nargs="*", help="after --: more arguments for tritonserver")
    return parser.parse_args()


def main() -> int:
    escape_unprintable()
    arguments = parse_arguments()
    ports = {
        "--http-port": arguments.http_port,
        "--grpc-port": arguments.grpc_port,
        "--metrics-port": arguments.metrics_port,
        "--health-port": arguments.health_port,
    }
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s scripts/serve: %(message)s")
    health = Health()
    try:
        with StopSignals() as stop:
            _warn_of_misspelt_variables()
            _check_triton_arguments(arguments.triton_arguments)
            check_ports_free(arguments.host, ports)
            with health_server(health, arguments.host, arguments.health_port):
                settings = _settings(arguments)
                with run_directory() as directory:
                    _serve(settings, directory, arguments, health, stop)
    except (SettingsError, ServerError, InstallationError, PlainPathError, OSError) as error:
        print(f"scripts/serve: {error}", file=sys.stderr)
        return 1
    return 0


def _warn_of_misspelt_variables() -> None:
    for name, meant in misspelt_variables(os.environ, _OTHER_VARIABLES).items():
        hint = f"; did you mean {meant[0]}?" if meant else ""
        logging.warning("the environment has %s, which is no setting%s", name, hint)


def _check_triton_arguments(arguments: Sequence[str]) -> None:
    """Raises `SettingsError` for an argument of Triton's by which its supervisor could not find the server any more."""
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if name in _SUPERVISED:
            expected = f"{_SUPERVISED[name]} of scripts/serve"
            raise SettingsError(f"{argument}: got an option of Triton's but expected {expected}")


def _settings(arguments: argparse.Namespace) -> dict[str, Settings]:
    """The settings of each checkpoint, by the prefix of its models' names. Raises `SettingsError`, `ServerError`."""
    given = {
        field.name: getattr(arguments, field.name) or os.environ.get(environment_name(field.name), "")
        for field in fields(Settings)
    }
    checkpoints = {"": given["checkpoint"], **_further_checkpoints(arguments.also)}
    # Whatever can be refused at once is, before the minutes that fetching, verifying and loading may take.
    early = read_settings({**given, "checkpoint": "not known yet"}, {})
    if early.device.startswith("cuda") or early.dtype == "float16" or early.compile == "graphs":
        # What only a GPU can do. To look for one takes PyTorch two seconds.
        device = resolve_device(early)
        resolve_dtype(early, device)
        resolve_compile(early, device)
    cache = Path(arguments.cache_dir).expanduser()
    options = {prefix: "--also" if prefix else "--checkpoint" for prefix in checkpoints}
    directories = {prefix: local_checkpoint(each, cache, options[prefix]) for prefix, each in checkpoints.items()}
    for prefix, directory in directories.items():
        verify_checkpoint(directory, cache, options[prefix])
    return {prefix: read_settings({**given, "checkpoint": str(path)}, {}) for prefix, path in directories.items()}


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


def _serve(
    settings: Mapping[str, Settings],
    directory: Path,
    arguments: argparse.Namespace,
    health: Health,
    stop: StopSignals,
) -> None:
    """Runs a server with one set of models for each entry of `settings`, whose key is the prefix of their names."""
    triton = find_triton(directory)
    repository = directory / "models"
    # Before Triton looks: it takes bytecode that appears beside a model's code later for a change of the model.
    compileall.compile_dir(MODEL_REPOSITORY, quiet=2)
    models = [prefix + ENSEMBLE for prefix in settings]
    for prefix, of_checkpoint in settings.items():
        write_repository(MODEL_REPOSITORY, repository, of_checkpoint, prefix, models)
    # The settings are in the configurations now; the environment would override them.
    environment = {name: value for name, value in triton.environment.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    environment = with_plain_folders(environment, directory)
    environment[entrance.FOLDER_VARIABLE] = str(directory)
    # Idle OpenMP threads must not spin, because the stages' processes share the cores (ten times slower otherwise).
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The progress bars of the libraries that load the weights do not belong in a server's log.
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment.setdefault("DIFFUSERS_VERBOSITY", "error")
    key = arguments.admin_key or secrets.token_hex(16)
    words = [
        str(triton.binary),
        *triton.arguments,
        f"--model-repository={repository}",
        f"--http-address={arguments.host}",
        f"--grpc-address={arguments.host}",
        f"--metrics-address={arguments.host}",
        f"--http-port={arguments.http_port}",
        f"--grpc-port={arguments.grpc_port}",
        f"--metrics-port={arguments.metrics_port}",
        f"--http-restricted-api={_RESTRICTED}:admin-key={key}",
        f"--grpc-restricted-protocol={_RESTRICTED}:admin-key={key}",
        *_restricted_to(arguments.api_key),
        # A client that vanished, with its network, is noticed in seconds; by default after two hours.
        f"--grpc-keepalive-time={_KEEPALIVE_IN_MS}",
        f"--grpc-keepalive-timeout={_KEEPALIVE_IN_MS}",
        "--grpc-http2-max-pings-without-data=0",
        # Clients that ping as often are welcome.
        "--grpc-http2-min-recv-ping-interval-without-data=5000",
        # Whose trace a request belongs to reaches the models as a parameter, and stands in their log.
        *(f"--{protocol}-header-forward-pattern=(?i){TRACEPARENT}" for protocol in ("http", "grpc")),
        "--disable-auto-complete-config",
        "--model-control-mode=none",
        "--backend-config=python,stub-timeout-seconds=600",  # a busy machine may take minutes to import torch
        # Calls of a stage by `audioldm2_stream` hold two threads each until they are answered.
        "--backend-config=python,thread-pool-size=256",
        # Shared memory that can be told from other servers', so that it can be removed after a kill.
        f"--backend-config=python,shm-region-prefix-name={directory.name}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_IN_S}",
        *arguments.triton_arguments,
    ]
    command = ServerCommand(
        words,
        environment,
        arguments.host,
        arguments.http_port,
        arguments.metrics_port,
        directory,
        key,
        models_may_change(arguments.triton_arguments),
    )
    run_server(
        command,
        stop,
        health,
        lambda: _report_ready(arguments),
        arguments.drain_timeout_in_s,
        Patience(stalled_in_s=arguments.stall_timeout_in_s),
        RestartLimit(arguments.max_restarts, longest_delay_in_s=arguments.max_restart_delay_in_s),
    )


def _restricted_to(api_key: str) -> list[str]:
    """Triton's options that keep all but health for those who have the key."""
    if not api_key:
        return []
    guarded = f"{_GUARDED}:{API_KEY_HEADER}={api_key}"
    return [f"--http-restricted-api={guarded}", f"--grpc-restricted-protocol={guarded}"]


def _report_ready(arguments: argparse.Namespace) -> None:
    host = "localhost" if arguments.host in ("127.0.0.1", "0.0.0.0") else arguments.host
    print(
        f"ready: grpc://{host}:{arguments.grpc_port} http://{host}:{arguments.http_port}"
        f" metrics http://{host}:{arguments.metrics_port}/metrics"
        f" health http://{host}:{arguments.health_port}/ready",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

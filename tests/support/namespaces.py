"""Commands in Linux namespaces of their own: without a network, or with file systems that nobody else sees."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest


def in_namespace(*kinds: str) -> list[str]:
    """The beginning of a command line that runs the rest apart; `kinds` are options of `unshare`, as `--net`.

    Root makes the namespaces as it is, others in a user namespace in which they are root.
    """
    prefix = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), *kinds]
    subprocess.run([*prefix, "true"], check=True)  # where that is forbidden, this says so
    return prefix


@contextmanager
def another_host() -> Iterator[tuple[str, list[str]]]:
    """A network namespace that is linked to this one: our address in it, and how to begin a command line there.

    Skips the test where such a link cannot be made, as in an unprivileged container.
    """
    name, address, other = f"host-{os.getpid()}", "10.213.7.1", "10.213.7.2"
    ours, theirs = (f"v{os.getpid()}{end}" for end in "ab")
    steps = (
        f"ip netns add {name}",
        f"ip link add {ours} type veth peer name {theirs} netns {name}",
        f"ip addr add {address}/30 dev {ours}",
        f"ip link set {ours} up",
        f"ip -n {name} addr add {other}/30 dev {theirs}",
        f"ip -n {name} link set {theirs} up",
    )
    try:
        for step in steps:
            try:
                subprocess.run(step.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no second host: {step}: {error}")
        yield address, ["ip", "netns", "exec", name]
    finally:
        for step in (f"ip link del {ours}", f"ip netns del {name}"):
            with suppress(OSError):
                subprocess.run(step.split(), capture_output=True)

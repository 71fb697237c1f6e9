"""Commands in Linux namespaces of their own: without a network, or with file systems that nobody else sees."""

import os
import subprocess


def in_namespace(*kinds: str) -> list[str]:
    """The beginning of a command line that runs the rest apart; `kinds` are options of `unshare`, as `--net`.

    Root makes the namespaces as it is, others in a user namespace in which they are root.
    """
    prefix = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), *kinds]
    subprocess.run([*prefix, "true"], check=True)  # where that is forbidden, this says so
    return prefix

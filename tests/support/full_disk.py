"""Fetches onto a disk that is too small, then makes it larger and fetches again. Runs in a mount namespace of its own.

Arguments: the mount point, the disk's size in bytes, the repository. The last line on standard output is a report.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

from checkpoints.__main__ import main


def run() -> None:
    disk, size, repository = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    out = disk / "out"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
    # As with a quota, and where others write to the same disk: what is said to be free turns out not to be.
    usage = namedtuple("usage", "free")
    shutil.disk_usage = lambda _: usage(free=2**40)  # type: ignore[assignment]
    codes = [main(["fetch", repository, "--out", str(out)])]
    whole_after_first = out.exists()
    subprocess.run(["mount", "-o", f"remount,size={2 * size}", disk], check=True)
    codes.append(main(["fetch", repository, "--out", str(out)]))
    hashes = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file() and path.name != "revision.json"
    }
    print(json.dumps({"codes": codes, "whole_after_first": whole_after_first, "hashes": hashes}))


run()

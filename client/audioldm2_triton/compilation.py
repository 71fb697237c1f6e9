"""Compiled code that outlives the process that made it, by PyTorch's own mechanism.

`torch.compiler.save_cache_artifacts` gives what `torch.compile` has made in this process as bytes. They are kept in a
file named by what they depend on, so that another PyTorch, device or shape never finds them, behind a digest, so that
a file cut short is noticed. PyTorch checks the entries themselves once more when it looks them up: what does not fit is
compiled anew.
"""

import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from audioldm2_triton.settings import Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_DIGEST_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class CompileCache:
    """One file of compiled code; without a path, there is none."""

    path: Path | None

    def restore(self) -> bool:
        """Hands the file's contents to PyTorch before anything is compiled; whether there were any.

        A file that is missing, cut short or refused is ignored with a line in the log.
        """
        import torch

        if self.path is None:
            return False
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            logger.info("compile cache: nothing yet in %s", self.path)
            return False
        except OSError as error:
            logger.warning("compile cache: %s is ignored: %s", self.path, error)
            return False
        digest, artifacts = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(artifacts).digest() != digest:
            logger.warning("compile cache: %s is ignored: it is not whole", self.path)
            return False
        try:
            restored = torch.compiler.load_cache_artifacts(artifacts) is not None
        except Exception as error:
            logger.warning("compile cache: %s is ignored: %s", self.path, error)
            return False
        logger.info("compile cache: %s from %s", "restored" if restored else "nothing of use", self.path)
        return restored

    def save(self) -> None:
        """Writes what this process has compiled or restored; a failure is a line in the log."""
        import torch

        if self.path is None:
            return
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            logger.info("compile cache: nothing to save in %s", self.path)
            return
        artifacts, _ = saved
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: another server never reads half a file.
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(artifacts).digest() + artifacts)
                os.replace(name, self.path)
            except OSError:
                os.unlink(name)  # a full disk should not stay full of halves
                raise
        except OSError as error:
            logger.warning("compile cache: %s could not be written: %s", self.path, error)


def compile_cache(
    settings: Settings, stage: str, device: "torch.device", dtype: "torch.dtype", shapes: Sequence[object]
) -> CompileCache:
    """The file of one stage, named by PyTorch's version, the device, the dtype and the shapes.

    Args:
        shapes: whatever else decides what is compiled, such as buckets and the configs of the components.
    """
    import torch

    if not settings.compile_cache:
        return CompileCache(None)
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    key = repr((torch.__version__, hardware, str(dtype), *shapes))
    name = f"{stage}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin"
    return CompileCache(Path(settings.compile_cache).expanduser() / name)

"""Makes forwards fast for a few fixed shapes, and keeps compiled code across restarts.

`torch.compiler.save_cache_artifacts` returns what `torch.compile` has made in this process as bytes. They are stored in
a file named after everything that they depend on, so that another PyTorch, device or shape never finds them, and after
a digest, so that a truncated file is noticed. PyTorch checks each entry again when it looks it up, and compiles anew
what does not fit. On a CPU its artifacts lack the libraries made by the C++ compiler, which takes most of the time, so
the file has them too.
"""

import hashlib
import inspect
import io
import logging
import os
import platform
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from audioldm2_triton.server.cuda_graphs import CudaGraphRecorder, GraphedFunction
from audioldm2_triton.server.settings import Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_ARTIFACTS: Final = "artifacts"  # in the file, beside the libraries by their paths in PyTorch's directory


def for_fixed_shapes(
    function: Callable[..., Any],
    device: "torch.device",
    num_shapes: int,
    use_compiler: bool = True,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """Makes a function of tensors fast for a few shapes. Call it once with each of them before time matters.

    Args:
        function: as `GraphedFunction` takes it; compiled as a whole, so it must have no data-dependent branches.
        num_shapes: for how many shapes it may be compiled.
        use_compiler: whether `torch.compile` makes its kernels.
        backend: of `torch.compile`.

    On a GPU, the kernels are replayed as CUDA graphs, compiled or not.
    """
    return graphed(compiled(function, num_shapes, backend) if use_compiler else function, device)


def graphed(function: Callable[..., Any], device: "torch.device") -> Callable[..., Any]:
    """Returns a function that replays a CUDA graph for each shape; on a CPU the function itself."""
    return GraphedFunction(function, CudaGraphRecorder(device)) if device.type == "cuda" else function


def compiled(
    function: Callable[..., Any], num_shapes: int, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """Compiles for up to so many shapes. PyTorch's own limit is 8, for all graphs of the same code together."""
    import torch

    limits: dict[str, Any] = {"recompile_limit": num_shapes, "isolate_recompiles": True}
    if limits.keys() - inspect.signature(torch.compile).parameters.keys():
        # Before 2.13 the limit applies to the whole process.
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, num_shapes)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * num_shapes)
        limits = {}
    faster: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, **limits)
    return faster


@dataclass(frozen=True)
class CompileCache:
    """One file of compiled code; without a path, there is none."""

    path: Path | None

    def restore(self) -> bool:
        """Hands the file's contents to PyTorch, before anything is compiled. Returns whether it restored any.

        A file that is missing, truncated or refused is ignored, with a line in the log.
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
        digest, archive = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(archive).digest() != digest:
            logger.warning("compile cache: %s is ignored: it is not whole", self.path)
            return False
        try:
            restored = torch.compiler.load_cache_artifacts(_unpacked(archive)) is not None
        except Exception as error:
            logger.warning("compile cache: %s is ignored: %s", self.path, error)
            return False
        logger.info("compile cache: %s from %s", "restored" if restored else "nothing of use", self.path)
        return restored

    def save(self) -> None:
        """Writes what this process has compiled or restored; a failure is only logged."""
        import torch

        if self.path is None:
            return
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            logger.info("compile cache: nothing to save in %s", self.path)
            return
        archive = _packed(saved[0])
        try:
            _write_whole(self.path, hashlib.sha256(archive).digest() + archive)
        except OSError as error:
            logger.warning("compile cache: %s could not be written: %s", self.path, error)


def _packed(artifacts: bytes) -> bytes:
    """Packs PyTorch's artifacts and the libraries that this process has loaded from PyTorch's directory."""
    directory = _compiler_directory()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_ARTIFACTS, artifacts)
        for library in _loaded_libraries(directory):
            archive.write(library, str(library.relative_to(directory)))
    return buffer.getvalue()


def _unpacked(content: bytes) -> bytes:
    """Returns the artifacts, and writes the libraries to where PyTorch looks for them, unless they are there."""
    directory = _compiler_directory()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            if name != _ARTIFACTS and not (directory / name).exists():
                _write_whole(directory / name, archive.read(name))
        return archive.read(_ARTIFACTS)


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file and renames it into place, so that no process reads half of it. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)  # so that partial files do not keep a full disk full
        raise


def _compiler_directory() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _loaded_libraries(directory: Path) -> list[Path]:
    """Returns the loaded libraries below `directory`; none on systems without /proc/self/maps."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if line.endswith(".so")}
    return sorted(path for path in map(Path, paths) if path.is_relative_to(directory) and path.exists())


def _processor() -> str:
    """Describes the CPU, because compilers make machine code for exactly this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return " ".join(dict.fromkeys(told))


def compile_cache(
    settings: Settings, stage: str, device: "torch.device", dtype: "torch.dtype", shapes: Sequence[object]
) -> CompileCache:
    """Returns the cache of one stage, in a file named after PyTorch's version, the device, the dtype and the shapes.

    Args:
        shapes: everything else that decides what is compiled, such as buckets and the configs of the components.
    """
    import torch

    if not settings.compile_cache:
        return CompileCache(None)
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    else:
        hardware = f"{_processor()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    key = repr((torch.__version__, hardware, str(dtype), *shapes))
    name = f"{stage}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin"
    return CompileCache(Path(settings.compile_cache).expanduser() / name)

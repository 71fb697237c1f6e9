"""`offload`: a stage's weights are on its device only while it works, and only one stage's at a time.

The host keeps them in one block of memory. For a GPU it is pinned; the GPU gets a copy of the block in one transfer and
drops it again. Nothing is copied back, because weights do not change. On a CPU it is a mapped file on a disk, whose
pages are loaded as they are read, and afterwards removed from the resident set. The results are the same, bit for bit.

accelerate's hooks do less: they copy the weights back each time, through memory that is not pinned; they only watch
`forward`, although the stages call other functions too; and they know nothing of the device's other processes.
"""

import ctypes
import logging
import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from audioldm2_triton.server.device_lease import DeviceLease
from audioldm2_triton.server.settings import Settings

if TYPE_CHECKING:
    from types import TracebackType

    import torch

logger = logging.getLogger(__name__)

TURN_IN_S: Final = 1.0
"""How long a busy stage keeps its weights on the device while another one waits."""
DEFAULT_DIRECTORY: Final = "/var/tmp"  # on a disk, where /tmp is often memory
_ALIGNMENT: Final = 256  # bytes, as a GPU's kernels require
_CACHE_LINE: Final = 64  # bytes


class Residency:
    """Controls when one stage's weights are on its device. Without a lease they always are, and this does nothing.

    Use it as a context manager around whatever uses the weights, or call `enter` and `leave`, which may be repeated.
    Of nested blocks, only the outermost leaves. Used by one thread at a time.
    """

    def __init__(self, device: "torch.device | None" = None, lease: DeviceLease | None = None) -> None:
        self._device = device
        self._lease = lease
        self._store: PinnedStore | MappedStore | None = None
        self._entered_at: float | None = None
        self._blocks = 0

    def __enter__(self) -> None:
        self.enter()
        self._blocks += 1

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", traceback: "TracebackType | None"
    ) -> None:
        self._blocks -= 1
        if not self._blocks:
            self.leave()

    def adopt(self, *modules: Any) -> None:
        """Takes over the weights of modules on the device, and copies them to host memory.

        Called once, between `enter` and `leave`.
        """
        if self._lease is None or self._device is None:
            return
        _detach_from_files(modules)
        tensors = _weights(modules)
        self._store = MappedStore(tensors) if self._device.type == "cpu" else PinnedStore(tensors, self._device)
        self._store.load()
        logger.info("offload: %.0f MB of weights in %s; nothing is compiled", self._store.size / 1e6, self._store.place)

    def enter(self) -> None:
        """Waits for the lease, and loads the weights. Raises the device's error if they do not fit."""
        if self._lease is None or self._entered_at is not None:
            return
        self._lease.acquire()
        self._entered_at = time.monotonic()
        if self._store is not None:
            try:
                self._store.load()
            except BaseException:
                self.leave()
                raise

    def leave(self) -> None:
        """Unloads the weights, and releases the lease."""
        if self._lease is None or self._entered_at is None:
            return
        try:
            if self._store is not None:
                self._store.unload()
        finally:
            self._entered_at = None
            self._lease.release()

    @property
    def is_wanted(self) -> bool:
        """Returns whether another stage waits for the device."""
        return self._lease is not None and self._lease.is_wanted()

    def give_way(self) -> None:
        """Leaves if another stage waits and this one has had `TURN_IN_S`; for a stage that may always be busy."""
        if self._lease is None or self._entered_at is None:
            return
        if time.monotonic() - self._entered_at >= TURN_IN_S and self.is_wanted:
            self.leave()


def stage_residency(settings: Settings, device: "torch.device") -> Residency:
    """Makes the residency that the setting `offload` asks for."""
    if settings.offload == "off":
        return Residency()
    return Residency(device, DeviceLease(_device_name(device)))


def _device_name(device: "torch.device") -> str:
    """Returns a name that is the same in every process, whichever devices it sees."""
    import torch

    if device.type != "cuda":
        return device.type
    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"


def _detach_from_files(modules: tuple[Any, ...]) -> None:
    """Replaces buffers that are views, as loaded by transformers, because a view keeps its base, the mapped file."""
    copies: dict[torch.Tensor, torch.Tensor] = {}  # tensors hash by identity
    for part in (part for module in modules for part in module.modules()):
        for name, buffer in part.named_buffers(recurse=False):
            if buffer._is_view():
                part._buffers[name] = copies.setdefault(buffer, buffer.data)


def _weights(modules: tuple[Any, ...]) -> list["torch.Tensor"]:
    """Returns the parameters and buffers of modules, each once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in tensors if tensor.numel()}.values())


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the block."""

    first: int  # bytes, as `end`
    end: int
    dtype: "torch.dtype"
    shape: "torch.Size"
    stride: tuple[int, ...]

    def of(self, block: "torch.Tensor") -> "torch.Tensor":
        return block[self.first : self.end].view(self.dtype).as_strided(self.shape, self.stride)


def _slots(tensors: list["torch.Tensor"]) -> list[_Slot]:
    import torch

    slots: list[_Slot] = []
    end = 0
    for tensor in tensors:
        # On a CPU, where in a cache line a tensor begins affects the last bits of a product, and tensors that were read
        # from a file begin anywhere. So the offset within the line is kept.
        first = -(-end // _ALIGNMENT) * _ALIGNMENT + tensor.data_ptr() % _CACHE_LINE
        end = first + tensor.numel() * tensor.element_size()
        # As dense as a copy would be, with the same order of dimensions: convolutions are channels-last.
        stride = torch.empty_like(tensor, device="meta").stride()
        slots.append(_Slot(first, end, tensor.dtype, tensor.shape, stride))
    return slots


class PinnedStore:
    """Keeps weights in host memory, pinned for a GPU; when loaded, they are a copy on the device."""

    place: Final = "pinned host memory"

    def __init__(self, tensors: list["torch.Tensor"], device: "torch.device") -> None:
        import torch

        self._tensors = tensors
        self._device = device
        self._slots = _slots(tensors)
        self.size = self._slots[-1].end
        self._block = torch.empty(self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for tensor, slot in zip(tensors, self._slots, strict=True):
            slot.of(self._block).copy_(tensor.detach())
        self.unload()

    def load(self) -> None:
        self._assign(self._block.to(self._device, non_blocking=True, copy=True))

    def unload(self) -> None:
        import torch

        self._assign(self._block)
        if self._device.type == "cuda":
            # So that the other processes can use the memory that this one would only cache.
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _assign(self, block: "torch.Tensor") -> None:
        for tensor, slot in zip(self._tensors, self._slots, strict=True):
            tensor.data = slot.of(block)


class MappedStore:
    """Keeps a CPU's weights in a mapped file without a name, in TMPDIR or /var/tmp, which must be on a disk.

    They can always be read; when unloaded, none of their pages is in the resident set.
    """

    place: Final = "a mapped file"

    def __init__(self, tensors: list["torch.Tensor"]) -> None:
        import torch

        slots = _slots(tensors)
        self.size = slots[-1].end
        with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", DEFAULT_DIRECTORY)) as file:
            # Allocated, so that a full disk is an error now rather than a crash later.
            os.posix_fallocate(file.fileno(), 0, self.size)
            self._mapping = mmap.mmap(file.fileno(), self.size)
        block = torch.frombuffer(self._mapping, dtype=torch.uint8)
        for tensor, slot in zip(tensors, slots, strict=True):
            mapped = slot.of(block)
            mapped.copy_(tensor.detach())
            tensor.data = mapped
        self._mapping.flush()
        self.unload()

    def load(self) -> None:
        self._mapping.madvise(mmap.MADV_WILLNEED)

    def unload(self) -> None:
        self._mapping.madvise(mmap.MADV_DONTNEED)
        # Freed memory goes back to the system too; otherwise the allocator would keep it.
        ctypes.CDLL(None).malloc_trim(0)

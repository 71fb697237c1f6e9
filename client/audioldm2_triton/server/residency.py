"""`offload`: a stage's weights are on its device only while it works, and only one stage's at a time.

Their home is one block of host memory: pinned, for a GPU, which gets a copy of the block in one transfer and drops it
again; nothing is copied back, since weights do not change. On a CPU it is a mapped file on a disk, from which pages
come as they are read; afterwards they are taken out of the resident set. The numbers are the same bits either way.

accelerate's hooks do less here: they copy the weights back each time, from and to memory that is not pinned, watch
`forward`, which is not all that the stages call, and know nothing of the other processes of the device.
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
"""How long a stage that never rests keeps its weights on the device although another waits."""
DEFAULT_DIRECTORY: Final = "/var/tmp"  # on a disk, where /tmp is often memory
_ALIGNMENT: Final = 256  # bytes, what a GPU's kernels want
_CACHE_LINE: Final = 64  # bytes


class Residency:
    """When one stage's weights are on its device; without a lease always, and all of this does nothing.

    As a context manager, around what uses the weights; or by `enter` and `leave`, which may be repeated. Used by one
    thread at a time.
    """

    def __init__(self, device: "torch.device | None" = None, lease: DeviceLease | None = None) -> None:
        self._device = device
        self._lease = lease
        self._home: PinnedHome | MappedHome | None = None
        self._entered_at: float | None = None

    def __enter__(self) -> None:
        self.enter()

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", traceback: "TracebackType | None"
    ) -> None:
        self.leave()

    def adopt(self, *modules: Any) -> None:
        """Gives the weights of modules that are on the device their home; called once, inside."""
        if self._lease is None or self._device is None:
            return
        _part_from_their_files(modules)
        tensors = _weights(modules)
        self._home = MappedHome(tensors) if self._device.type == "cpu" else PinnedHome(tensors, self._device)
        self._home.move_in()
        logger.info("offload: %.0f MB of weights in %s; nothing is compiled", self._home.size / 1e6, self._home.place)

    def enter(self) -> None:
        """Waits for the lease, and brings the weights in. Raises what the device says where they do not fit."""
        if self._lease is None or self._entered_at is not None:
            return
        self._lease.acquire()
        self._entered_at = time.monotonic()
        if self._home is not None:
            try:
                self._home.move_in()
            except BaseException:
                self.leave()
                raise

    def leave(self) -> None:
        """Takes the weights out, and gives the lease back."""
        if self._lease is None or self._entered_at is None:
            return
        try:
            if self._home is not None:
                self._home.move_out()
        finally:
            self._entered_at = None
            self._lease.release()

    def give_way(self) -> None:
        """Leaves where another stage waits and this one has had its turn; for stages that do not rest by themselves."""
        if self._lease is None or self._entered_at is None:
            return
        if time.monotonic() - self._entered_at >= TURN_IN_S and self._lease.is_wanted():
            self.leave()


def stage_residency(settings: Settings, device: "torch.device") -> Residency:
    """As the setting `offload` has it."""
    if settings.offload == "off":
        return Residency()
    return Residency(device, DeviceLease(_device_name(device)))


def _device_name(device: "torch.device") -> str:
    """The same in every process, whichever devices it sees."""
    import torch

    if device.type != "cuda":
        return device.type
    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"


def _part_from_their_files(modules: tuple[Any, ...]) -> None:
    """Replaces buffers that are views, as transformers reads them: a view keeps its base, which is the mapped file."""
    others: dict[torch.Tensor, torch.Tensor] = {}  # tensors are told apart by identity
    for part in (part for module in modules for part in module.modules()):
        for name, buffer in part.named_buffers(recurse=False):
            if buffer._is_view():
                part._buffers[name] = others.setdefault(buffer, buffer.data)


def _weights(modules: tuple[Any, ...]) -> list["torch.Tensor"]:
    """The parameters and buffers of modules, each once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in tensors if tensor.numel()}.values())


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the block."""

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
        # Where in a cache line a tensor begins decides the last bits of a product on a CPU. Those that were read from a
        # file begin anywhere.
        first = -(-end // _ALIGNMENT) * _ALIGNMENT + tensor.data_ptr() % _CACHE_LINE
        end = first + tensor.numel() * tensor.element_size()
        # As dense as a copy is, in the same order of dimensions: convolutions have their channels last.
        stride = torch.empty_like(tensor, device="meta").stride()
        slots.append(_Slot(first, end, tensor.dtype, tensor.shape, stride))
    return slots


class PinnedHome:
    """Weights in host memory, pinned where the device is a GPU; in, they are a copy of it on the device."""

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
        self.move_out()

    def move_in(self) -> None:
        self._assign(self._block.to(self._device, non_blocking=True, copy=True))

    def move_out(self) -> None:
        import torch

        self._assign(self._block)
        if self._device.type == "cuda":
            # For the other processes, which cannot use what this one only keeps.
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _assign(self, block: "torch.Tensor") -> None:
        for tensor, slot in zip(self._tensors, self._slots, strict=True):
            tensor.data = slot.of(block)


class MappedHome:
    """Weights of a CPU in a mapped file without a name, in the directory TMPDIR or /var/tmp, which must be on a disk.

    They are always there to be read; out, none of their pages is in the resident set.
    """

    place: Final = "a mapped file"

    def __init__(self, tensors: list["torch.Tensor"]) -> None:
        import torch

        slots = _slots(tensors)
        self.size = slots[-1].end
        with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", DEFAULT_DIRECTORY)) as file:
            # Allocated, so that a full disk is an error now rather than the end of the process later.
            os.posix_fallocate(file.fileno(), 0, self.size)
            self._mapping = mmap.mmap(file.fileno(), self.size)
        block = torch.frombuffer(self._mapping, dtype=torch.uint8)
        for tensor, slot in zip(tensors, slots, strict=True):
            mapped = slot.of(block)
            mapped.copy_(tensor.detach())
            tensor.data = mapped
        self._mapping.flush()
        self.move_out()

    def move_in(self) -> None:
        self._mapping.madvise(mmap.MADV_WILLNEED)

    def move_out(self) -> None:
        self._mapping.madvise(mmap.MADV_DONTNEED)
        # What the work has freed goes back too: the allocator keeps it otherwise.
        ctypes.CDLL(None).malloc_trim(0)

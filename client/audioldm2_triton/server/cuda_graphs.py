"""Runs functions of fixed shapes as CUDA graphs: one launch instead of a thousand.

The graphs are recorded here rather than by `torch.compile(mode="reduce-overhead")`, because a replay then checks no
guards (those of the UNet's 1,288 parameters take milliseconds), any thread may replay, eager code can be recorded as
well as compiled code, and all of it works the same in PyTorch 2.11 and 2.13.
"""

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

WARM_UP_CALLS: Final = 3
"""Calls before a function is recorded: at the first, compilers compile and libraries choose kernels and workspaces."""

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Runs a function once. Returns what reruns it on the same memory, and its output, which a rerun overwrites."""


class CudaGraphRecorder:
    """Records on one GPU. All its graphs share their memory, so only one may run at a time."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: PyTorch never gives the memory that was freed on one stream to another.
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        import torch

        with torch.cuda.device(self._device):
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may allocate meanwhile; their calls do not belong to this graph.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = function()
            torch.cuda.empty_cache()  # what the calls before the recording needed, no replay does
        return lambda: _replay(graph, self._device), output


def _replay(graph: Any, device: "torch.device") -> None:
    import torch

    with torch.cuda.device(device):
        graph.replay()


@dataclass
class _Recording:
    inputs: list["Tensor"]  # what the graph reads
    sources: "list[weakref.ref[Tensor]]"  # what they were last copied from; weak, so that a graph holds no second copy
    replay: Callable[[], None]
    output: Any  # what the graph writes
    objects: list[Any]  # the arguments that are known by their identity, which nobody else may get


class GraphedFunction:
    """A function of tensors that is recorded once for each shape of its arguments, and replayed after that.

    Args:
        function: takes tensors, and tuples and dataclasses of tensors, on one device, and returns a tensor. Any other
            argument must be the same object at each call. No call may wait for the device.
        record: makes the recordings.

    Tensors among the arguments must not be changed in place between two calls that get the same tensor: if it is the
    same object as at the last call, it is not copied again. The result belongs to the caller.
    """

    def __init__(self, function: Callable[..., Any], record: Record) -> None:
        self._function = function
        self._record = record
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *arguments: Any) -> Any:
        tensors, objects = list[Any](), list[Any]()
        key = _signature(arguments, tensors, objects)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._make(arguments, objects)
        for place, (source, tensor) in enumerate(zip(recording.sources, tensors, strict=True)):
            if source() is not tensor:
                recording.inputs[place].copy_(tensor, non_blocking=True)
                recording.sources[place] = weakref.ref(tensor)
        recording.replay()
        return recording.output.clone()

    def _make(self, arguments: tuple[Any, ...], objects: list[Any]) -> _Recording:
        inputs: list[Tensor] = []
        sources: list[weakref.ref[Tensor]] = []

        def fixed(tensor: "Tensor") -> "Tensor":
            sources.append(weakref.ref(tensor))
            # With the same strides, which align an attention mask.
            inputs.append(tensor.new_empty_strided(tensor.size(), tensor.stride()).copy_(tensor))
            return inputs[-1]

        own = _map_tensors(fixed, arguments)
        replay, output = self._record(lambda: self._function(*own))
        return _Recording(inputs, sources, replay, output, objects)


def _signature(value: Any, tensors: list[Any], objects: list[Any]) -> Hashable:
    """Returns what two calls must have in common to share a recording; appends its tensors and other objects."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple):
        return tuple(_signature(part, tensors, objects) for part in value)
    if dataclasses.is_dataclass(value):
        return tuple(_signature(getattr(value, field.name), tensors, objects) for field in dataclasses.fields(value))
    if isinstance(value, str | int | float | None):
        return value
    objects.append(value)
    return id(value)


def _map_tensors(function: "Callable[[Tensor], Tensor]", value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(function, part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _map_tensors(function, part) for name, part in parts.items()})
    return value

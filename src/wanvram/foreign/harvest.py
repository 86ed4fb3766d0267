"""What library operations of a script take on a real GPU: watched call by call while it runs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanvram.foreign.measured import MeasuredDevice, MeasuredOperation, MeasuredTable, arguments_text
from wanvram.foreign.operations import WITH_TEMPORARIES
from wanvram.foreign.values import tensors_in
from wanvram.machine.usable_gpu import require_gpu

__all__ = ["CardCounters", "LibraryWatch", "measuring_device"]

WATCHED = ("aten.convolution.default", *WITH_TEMPORARIES)
OWN = ("aten.", "prim.", "prims.", "profiler.")  # namespaces whose other operations have exact rules


class CardCounters(Protocol):
    def reset(self) -> None:
        """The peak is what is there now."""

    def beyond(self) -> int:
        """Bytes of the peak since `reset` beyond what is there now."""
        ...


class CudaCounters:
    """PyTorch's own, of the bytes that were asked for. The script's own peak counters are reset by it."""

    def reset(self) -> None:
        torch._C._cuda_resetPeakMemoryStats(torch.cuda.current_device())

    def beyond(self) -> int:
        requested = torch._C._cuda_memoryStats(torch.cuda.current_device())["requested_bytes"]["all"]
        return int(requested["peak"] - requested["current"])


class LibraryWatch(TorchDispatchMode):
    """Enter it around the code. place: the type of device whose tensors count."""

    def __init__(self, counters: CardCounters | None = None, place: str = "cuda") -> None:
        super().__init__()
        self.counters = counters or CudaCounters()
        self.place = place
        self._watched: dict[Any, str | None] = {}
        self._taken: dict[tuple[str, str], list[int]] = {}  # most bytes, calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch 2.13 would wrap every call, to hide it from a compiler that is not used."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = self._watched[func] if func in self._watched else self._learn(func)
        if name is None or not any(t.device.type == self.place for t in tensors_in((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        arguments = arguments_text(args, kwargs)  # before an operation in place changes them
        self.counters.reset()
        result = func(*args, **kwargs)
        taken = max(0, self.counters.beyond())
        entry = self._taken.setdefault((name, arguments), [0, 0])
        entry[0], entry[1] = max(entry[0], taken), entry[1] + 1
        return result

    def _learn(self, func: Any) -> str | None:
        name = str(func)
        watched = name.startswith(WATCHED) or not name.startswith(OWN)
        found = self._watched[func] = name if watched and not func.is_view else None
        return found

    def table(self, device: MeasuredDevice) -> MeasuredTable:
        """Largest first."""
        entries = [MeasuredOperation(*key, taken, calls) for key, (taken, calls) in self._taken.items()]
        return MeasuredTable(device, sorted(entries, key=lambda entry: -entry.bytes))


def measuring_device() -> MeasuredDevice:
    """The GPU at hand. Raises DeviceError where there is none."""
    require_gpu("no library was measured")
    properties, cudnn = torch.cuda.get_device_properties(torch.cuda.current_device()), torch.backends.cudnn
    return MeasuredDevice(
        gpu=properties.name,
        compute_capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        torch=torch.__version__,
        cudnn=cudnn.version() or 0,
        cudnn_benchmark=bool(cudnn.benchmark),
        cudnn_deterministic=bool(cudnn.deterministic),
    )

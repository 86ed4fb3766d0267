"""How much memory is used, now and at peak: CUDA's own statistics with NVML for the device, or counted storages on the CPU."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanvram.record import Memory

__all__ = ["CpuMeter", "CudaMeter", "Meter"]


class Meter(Protocol):
    """The memory of one device. Only `device_memory` may be slow (about 1 ms); the rest is microseconds."""

    def read(self) -> Memory:
        """Now, without the driver's figure."""
        ...

    def peak(self) -> Memory:
        """Highest since the last `reset_peak`, without the driver's figure."""
        ...

    def reset_peak(self) -> None: ...

    def device_memory(self) -> int | None:
        """What the driver says this process uses, bytes."""
        ...

    def synchronize(self) -> None: ...

    def host(self) -> tuple[int, int]:
        """(host bytes of the process, of which pinned for transfers)."""
        ...


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


class CudaMeter:
    """One CUDA device. The driver's figure is NVML's for this process; without NVML, what the device lost since the start."""

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._handle = _nvml_handle(index)
        self._others = 0
        self.pinned_bytes = 0
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info(index)
        if self._process_bytes() is None:
            # Everything used before our first allocation, less our own context, belongs to others: it cannot be told apart.
            self._others = total - free

    def read(self) -> Memory:
        return Memory(torch.cuda.memory_allocated(self._index), torch.cuda.memory_reserved(self._index), None)

    def peak(self) -> Memory:
        return Memory(torch.cuda.max_memory_allocated(self._index), torch.cuda.max_memory_reserved(self._index), None)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._index)

    def device_memory(self) -> int | None:
        used = self._process_bytes()
        if used is not None:
            return used
        free, total = torch.cuda.mem_get_info(self._index)
        return total - free - self._others

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def host(self) -> tuple[int, int]:
        return _resident_bytes(), self.pinned_bytes

    def _process_bytes(self) -> int | None:
        if self._handle is None:
            return None
        import pynvml

        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return None
        mine = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        return int(mine[0]) if mine and mine[0] else None


def _nvml_handle(index: int) -> Any:
    """NVML handle of a CUDA device, found by UUID because CUDA_VISIBLE_DEVICES renumbers; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".replace("GPU-GPU-", "GPU-"))
    except Exception:  # a machine without the driver's library fails in several ways; the figure is then taken from CUDA
        return None


class CpuMeter(TorchDispatchMode):
    """Live storages of CPU tensors, counted while the mode is entered. Reserved equals allocated: the CPU has no cache."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._allocated = 0
        self._peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._register(leaf.untyped_storage())
        return result

    def _register(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._live or nbytes == 0:
            return
        self._live[key] = nbytes
        self._allocated += nbytes
        self._peak = max(self._peak, self._allocated)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._allocated -= self._live.pop(key)

    def read(self) -> Memory:
        return Memory(self._allocated, self._allocated, None)

    def peak(self) -> Memory:
        return Memory(self._peak, self._peak, None)

    def reset_peak(self) -> None:
        self._peak = self._allocated

    def device_memory(self) -> int | None:
        return _resident_bytes()

    def synchronize(self) -> None:
        """CPU operations are finished when they return."""

    def host(self) -> tuple[int, int]:
        return _resident_bytes(), 0

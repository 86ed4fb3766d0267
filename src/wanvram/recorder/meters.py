"""How much memory is used, now and at peak: CUDA's own statistics and NVML, or counted storages on the CPU."""

from __future__ import annotations

import gc
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanvram.record import Memory
from wanvram.units import MIB

__all__ = ["CpuMeter", "CudaMeter", "Meter", "available_ram_bytes", "total_ram_bytes"]


class Meter(Protocol):
    """The memory of one device. Only `device_memory` may be slow (about 1 ms); the rest is microseconds."""

    @property
    def device_name(self) -> str:
        """`cuda:NVIDIA H200`, `cpu` or `simulated:h200`."""
        ...

    def read(self) -> Memory:
        """Now. The driver's figure only if it costs nothing, else None."""
        ...

    def peak(self) -> Memory:
        """Highest since the last `reset_peak`, the driver's figure as in `read`."""
        ...

    def reset_peak(self) -> None: ...

    def device_memory(self) -> int | None:
        """What the driver says this process uses, bytes."""
        ...

    def synchronize(self) -> None: ...

    def now(self, kind: str) -> float | None:
        """Seconds on the clock that spans of this kind are timed with; None if their time is not known."""
        ...

    def host(self) -> tuple[int, int]:
        """(host bytes of the process, of which pinned for transfers)."""
        ...


# A CUDA context takes at least this: 100 MiB on small cards, about 500 MiB on an H200.
SMALLEST_CONTEXT = 50 * MIB


class CudaMeter:
    """One CUDA device. The driver's figure is NVML's for this process, else what the card lost since the start."""

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._handle = _nvml_handle(index)
        self.device_name = "cuda:" + torch.cuda.get_device_name(index)
        self.pinned_bytes = 0
        self._process = psutil.Process()
        self._others = self._used_by_others()

    def read(self) -> Memory:
        return self._figures("current")

    def peak(self) -> Memory:
        return self._figures("peak")

    def _figures(self, which: str) -> Memory:
        # The nested form: memory_allocated() and its like sort all of about 150 statistics for one number.
        stats = torch.cuda.memory_stats_as_nested_dict(self._index)
        if not stats:  # nothing was ever allocated
            return Memory(0, 0, None)
        return Memory(stats["allocated_bytes"]["all"][which], stats["reserved_bytes"]["all"][which], None)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._index)

    def device_memory(self) -> int | None:
        used = self._process_bytes()
        if used is not None:
            return used
        return max(0, self._used() - self._others)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def now(self, kind: str) -> float | None:
        return time.perf_counter()

    def host(self) -> tuple[int, int]:
        return int(self._process.memory_info().rss), self.pinned_bytes

    def _used_by_others(self) -> int:
        """What to subtract where the driver does not tell processes apart (in most containers).

        Known if our context did not exist yet: it is created here, and what was used before belongs to others. If it
        existed, nothing is subtracted: a figure too high for a shared card is safer than one too low.
        """
        before = self._used() if self._handle is not None else None
        torch.cuda.synchronize(self._index)  # creates the context
        if before is None or self._process_bytes() is not None:
            return 0
        return before if self._used() - before > SMALLEST_CONTEXT else 0

    def _used(self) -> int:
        """Bytes used on the whole card, by everybody."""
        if self._handle is not None:
            import pynvml

            with suppress(pynvml.NVMLError):  # version 2 leaves out what the driver keeps for itself
                return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2).used)
        free, total = torch.cuda.mem_get_info(self._index)
        return total - free

    def _process_bytes(self) -> int | None:
        if self._handle is None:
            return None
        import pynvml

        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return None
        mine = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return int(mine[0]) if mine and mine[0] else None


def _nvml_handle(index: int) -> Any:
    """NVML handle of a CUDA device, found by UUID because CUDA_VISIBLE_DEVICES renumbers; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".replace("GPU-GPU-", "GPU-"))
    except Exception:  # without the driver's library this fails in several ways; the figure is then taken from CUDA
        return None


class CpuMeter(TorchDispatchMode):
    """Live storages of CPU tensors, counted while the mode is entered. Reserved equals allocated: the CPU has no cache.

    count_existing: tensors that live when the mode is entered count too, as on CUDA. Otherwise the first view of
    one, such as the transposed weight of a linear layer, would look like an allocation.
    """

    device_name = "cpu"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in simulate.memory: PyTorch's compiler is not used, so nothing need be hidden from it."""
        return False

    def __init__(self, *, count_existing: bool = False) -> None:
        super().__init__()
        self._count_existing = count_existing
        self._process = psutil.Process()
        self._live: dict[int, int] = {}
        self._allocated = 0
        self._peak = 0

    def __enter__(self) -> CpuMeter:
        if self._count_existing:
            # Tensors in Python's reach; type(), because some lazy modules answer isinstance() with an import.
            for item in [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]:
                with suppress(NotImplementedError, RuntimeError):  # tensor subclasses without a storage
                    if item.device.type == "cpu":
                        self._register(item.untyped_storage())
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided:
                self._register(leaf.untyped_storage())
        return result

    def _register(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known == nbytes or (known is None and nbytes == 0):
            return
        self._live[key] = nbytes
        self._allocated += nbytes - (known or 0)  # an `out=` tensor may be resized
        self._peak = max(self._peak, self._allocated)
        if known is not None:
            return
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._allocated -= self._live.pop(key)

    def read(self) -> Memory:
        return Memory(self._allocated, self._allocated, self.device_memory())

    def peak(self) -> Memory:
        return Memory(self._peak, self._peak, self.device_memory())

    def reset_peak(self) -> None:
        self._peak = self._allocated

    def device_memory(self) -> int | None:
        return int(self._process.memory_info().rss)

    def synchronize(self) -> None:
        """CPU operations are finished when they return."""

    def now(self, kind: str) -> float | None:
        return time.perf_counter()

    def host(self) -> tuple[int, int]:
        return int(self._process.memory_info().rss), 0


# Limit, use and the statistics' name of file pages that the kernel takes back before it kills: cgroup v2, then v1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_ram_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that can be used without swapping; what a container's limit leaves beside its use counts."""
    available = int(psutil.virtual_memory().available)
    for limit_file, use_file, statistics_file, reclaimable in _CGROUPS:
        limit = _text(cgroup / limit_file).strip()
        if not limit.isdigit():
            continue
        use = _text(cgroup / use_file).strip()
        statistics = dict(line.split() for line in _text(cgroup / statistics_file).splitlines() if line.count(" ") == 1)
        used = (int(use) if use.isdigit() else 0) - int(statistics.get(reclaimable, 0))
        available = min(available, max(0, int(limit) - max(0, used)))
    return available


def total_ram_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory of the machine, or a container's limit if that is less."""
    limits = [_text(cgroup / limit_file).strip() for limit_file, *_ in _CGROUPS]
    return min([int(psutil.virtual_memory().total), *(int(limit) for limit in limits if limit.isdigit())])


def _text(path: Path) -> str:
    """What a file of the system says; nothing where it does not exist."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""

"""How much memory is used, now and at peak: CUDA's own statistics and NVML, or counted storages on the CPU."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from wanvram.errors import DeviceError
from wanvram.machine.driver import DRIVER_BYTES, PageTables
from wanvram.machine.nvml import Gpu, first_gpu
from wanvram.spans import Memory
from wanvram.units import MIB

__all__ = ["CpuMeter", "CudaMeter", "Meter"]


class Meter(Protocol):
    """The memory of one device. Only `device_memory` may be slow (about 1 ms); the rest is microseconds."""

    @property
    def device_name(self) -> str:
        """`cuda:NVIDIA H200`, `cpu` or `simulated:h200`."""
        ...

    @property
    def caches(self) -> bool:
        """Reserved memory is a cache, which may be larger inside a span than at its ends."""
        ...

    def read(self) -> Memory:
        """Now. The driver's figure only if it costs nothing, else None."""
        ...

    def peak(self) -> Memory:
        """Highest since the last `reset_peak`, the driver's figure as in `read`."""
        ...

    def reset_peak(self) -> None: ...

    def device_memory(self) -> int | None:
        """What the card loses to this run, bytes: reserved, CUDA context, library modules and the driver's own."""
        ...

    def synchronize(self) -> None: ...

    def now(self, kind: str) -> float | None:
        """Seconds on the clock that spans of this kind are timed with; None if their time is not known."""
        ...

    def host(self) -> tuple[int, int]:
        """(host bytes of the process, of which pinned for transfers)."""
        ...


# More than this above what the driver charges to us is somebody else's.
OTHERS_BYTES = 32 * MIB
POLL_SECONDS = 0.005


class _Poll:
    """A thread that keeps the highest figure of the whole GPU: NVML's answer takes 0.1 ms and holds no lock of Python's."""

    def __init__(self, gpu: Gpu) -> None:
        self._highest = 0
        self._stop = threading.Event()
        # Nothing of the thread's holds this object, so that it ends with it.
        watched = gpu, self._stop, weakref.ref(self)
        threading.Thread(target=_watch, args=watched, name="wanvram-nvml", daemon=True).start()
        weakref.finalize(self, self._stop.set)

    def take(self) -> int:
        """Bytes, since the last time."""
        highest, self._highest = self._highest, 0
        return highest


def _watch(gpu: Gpu, stop: threading.Event, of: weakref.ref[_Poll]) -> None:
    while not stop.wait(POLL_SECONDS):
        poll = of()
        if poll is None:
            return
        try:
            poll._highest = max(poll._highest, gpu.used_bytes())
        except Exception:  # the driver is going away: figures then come from the ends of spans alone
            return
        del poll


class CudaMeter:
    """One CUDA device. Device memory is what the card loses to this run: NVML's figure of the whole GPU less what it was before.

    Where others use the card, too, it is what the driver charges to this process and what it takes for it besides
    (machine.driver). To be made before the process has a CUDA context; after that what was used before is not known.
    """

    caches = True
    _before: ClassVar[dict[str, int]] = {}  # by UUID: used before this process had a context

    def __init__(self, index: int = 0, *, poll: bool = True) -> None:
        """poll: keep a thread that watches the card, for a run of our own."""
        self._index = index
        self._gpu = _nvml_gpu()
        if self._gpu is not None and not torch.cuda.is_initialized():
            self._before.setdefault(self._gpu.uuid, self._gpu.used_bytes())
        self.device_name = "cuda:" + torch.cuda.get_device_name(index)
        self.pinned_bytes = 0
        self.tables = PageTables()
        self._process = psutil.Process()
        self._outside = 0
        self._poll = _Poll(self._gpu) if poll and self._gpu is not None else None

    def read(self) -> Memory:
        return self._figures("current")

    def peak(self) -> Memory:
        """The driver's figure is the highest that was polled, and at least what the allocator held with what was beside it."""
        memory = self._figures("peak")
        known = memory.reserved_bytes + self._outside if self._outside else 0
        return replace(memory, device_bytes=max(self._polled(known), known) or None)

    def _figures(self, which: str) -> Memory:
        # The nested form: memory_allocated() and its like sort all of about 150 statistics for one number.
        stats = torch.cuda.memory_stats_as_nested_dict(self._index)
        if not stats:  # nothing was ever allocated
            return Memory(0, 0, None)
        return Memory(stats["allocated_bytes"]["all"][which], stats["reserved_bytes"]["all"][which], None)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._index)

    def device_memory(self) -> int | None:
        if self._gpu is None:
            free, total = torch.cuda.mem_get_info(self._index)
            used = int(total) - int(free)
        else:
            used = self._card_loses()
        self._outside = max(0, used - torch.cuda.memory_reserved(self._index))
        return used

    def _card_loses(self) -> int:
        assert self._gpu is not None
        mine, before = self._gpu.process_bytes(), self._before.get(self._gpu.uuid)
        whole = self._gpu.used_bytes() - (before or 0)
        if mine is None:
            return max(0, whole)
        own = mine + DRIVER_BYTES + self.tables.held_bytes
        return own if before is None or whole > own + OTHERS_BYTES else whole

    def _polled(self, known: int) -> int:
        """The highest polled figure; 0 where others may be in it. known: what the allocator alone explains, bytes."""
        if self._gpu is None or self._poll is None:
            return 0
        used, before = self._poll.take(), self._before.get(self._gpu.uuid)
        whole = 0 if before is None else used - before
        return whole if whole <= known + 2 * OTHERS_BYTES else 0

    def used_by_others(self) -> int:
        """Bytes of the card that are not ours now."""
        free, total = torch.cuda.mem_get_info(self._index)
        return max(0, int(total) - int(free) - (self.device_memory() or 0))

    def pinned(self, change: int) -> None:
        """Host memory was pinned, or unpinned (negative)."""
        self.pinned_bytes += change
        self.tables.update(self.pinned_bytes)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def now(self, kind: str) -> float | None:
        return time.perf_counter()

    def host(self) -> tuple[int, int]:
        return int(self._process.memory_info().rss), self.pinned_bytes


def _nvml_gpu() -> Gpu | None:
    """None without the driver's library: figures are then CUDA's own."""
    with suppress(DeviceError, ImportError):
        return first_gpu()
    return None


class CpuMeter(TorchDispatchMode):
    """Live storages of CPU tensors, counted while the mode is entered. Reserved equals allocated: the CPU has no cache.

    count_existing: tensors that live when the mode is entered count too, as on CUDA. Otherwise the first view of
    one, such as the transposed weight of a linear layer, would look like an allocation.
    """

    device_name = "cpu"
    caches = False
    supports_higher_order_operators = True  # else PyTorch refuses them (cond, flex_attention) while tensors are counted

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: PyTorch would import its compiler, 1.6 s, to hide this mode from it; the next method does that."""
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """The program's torch.compile compiles as it does without this mode; its operations are counted when they run."""
        return True

    def __init__(self, *, count_existing: bool = False) -> None:
        super().__init__()
        self._count_existing = count_existing
        self._counting = False
        self._process = psutil.Process()
        self._live: dict[int, int] = {}
        self._allocated = 0
        self._peak = 0

    def __enter__(self) -> CpuMeter:
        if self._count_existing:
            # Tensors in Python's reach; type(), because some lazy modules answer isinstance() with an import.
            for item in [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]:
                self._see(item)
        self._counting = True
        if self not in _get_current_dispatch_mode_stack():  # it is there after an exit in another thread
            super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """The end of the counting, in any thread and order; only in the thread of `__enter__` the mode is taken off, too.

        PyTorch's own exit takes off whichever mode is uppermost, which may be the program's; those are put on again.
        """
        self._counting = False
        if self not in _get_current_dispatch_mode_stack():
            return
        above = []
        while (top := _get_current_dispatch_mode_stack()[-1]) is not self:
            TorchDispatchMode.__exit__(top, None, None, None)
            above.append(top)
        super().__exit__(kind, error, trace)
        for mode in reversed(above):
            TorchDispatchMode.__enter__(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._counting:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        """Fake tensors say that they are on the CPU; their storage, on meta, tells. Subclasses may refuse any question."""
        with suppress(Exception):
            if tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.device.type == "cpu":
                    self._register(storage)

    def _register(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known == nbytes or (known is None and nbytes == 0):
            return
        self._live[key] = nbytes
        self._allocated += nbytes - (known or 0)  # an `out=` tensor may be resized
        if self._allocated > self._peak:  # no call in it, so that no other thread's `_forget` comes between
            self._peak = self._allocated
        if known is not None:
            return
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        nbytes = self._live.pop(key)
        self._allocated -= nbytes

    def read(self) -> Memory:
        return Memory(self._allocated, self._allocated, self.device_memory())

    def peak(self) -> Memory:
        return Memory(self._peak, self._peak, self.device_memory())

    def reset_peak(self) -> None:
        self._peak = self._allocated

    def device_memory(self) -> int | None:
        if self._process.pid != os.getpid():  # forked
            self._process = psutil.Process()
        return int(self._process.memory_info().rss)

    def synchronize(self) -> None:
        """CPU operations are finished when they return."""

    def now(self, kind: str) -> float | None:
        return time.perf_counter()

    def host(self) -> tuple[int, int]:
        return self.device_memory() or 0, 0

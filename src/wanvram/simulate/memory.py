"""The simulated device: the pipeline runs on `meta` tensors, and every storage born or dead becomes an allocator event.

Owns: which storages live on the device and which on the host, and the library buffers each operation takes beside its outputs.
Does not own: the allocator's rules (allocator.py), library buffers (libraries.py), transfers (engine/devices.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanvram.machine.driver import PageTables
from wanvram.simulate.allocator import CachingAllocator
from wanvram.simulate.clock import Clock, Price
from wanvram.simulate.gpus import GPU
from wanvram.simulate.libraries import BufferPlan, Libraries
from wanvram.simulate.meta_results import Shortcut, shortcut_of
from wanvram.spans import Memory

if TYPE_CHECKING:
    from wanvram.simulate.timeline import Timeline

__all__ = ["AllocationEvent", "SimulatedMemory"]


@dataclass(frozen=True)
class AllocationEvent:
    """One allocator call. nbytes is negative for a free; operation is the ATen or wanvram operation that caused it."""

    nbytes: int
    operation: str
    handle: int


class SimulatedMemory(TorchDispatchMode):
    """Dispatch mode that feeds a CachingAllocator; also the memory meter of the simulated device.

    Enter it with `with memory:` around everything that runs on the device. Raises OutOfMemory from inside the operation that
    does not fit, like CUDA does.
    """

    def __init__(
        self,
        gpu: GPU,
        allocator: CachingAllocator,
        libraries: Libraries,
        *,
        clock: Clock | None = None,
        keep_events: bool = False,
    ) -> None:
        super().__init__()
        self.gpu = gpu
        self.allocator = allocator
        self.libraries = libraries
        self.host_bytes = 0
        self.host_peak_bytes = 0
        self.pinned_bytes = 0
        self.clock = clock or Clock(gpu)
        self.events: list[AllocationEvent] | None = [] if keep_events else None
        self.observer: Timeline | None = None  # hears every allocator call, after it
        self.live: dict[int, tuple[int, str]] = {}
        self._host: dict[int, int] = {}
        self._device: dict[int, int] = {}
        self._ignored: set[int] = set()
        self._pinned: set[int] = set()
        self._operations: dict[Any, tuple[str, Price | None, bool, Shortcut | None]] = {}
        self._placing_host = False
        self._pinning = False
        self._ignoring = False
        self.stream = 0  # whose pool of the allocator is asked
        self._operation = ""
        self.tables = PageTables()
        self._loaded: set[str] = set()
        self._outside = gpu.context_bytes
        self._limit = allocator.limit_bytes

    # --- meter -----------------------------------------------------------------------------------------------------------

    @property
    def device_name(self) -> str:
        return f"simulated:{self.gpu.key}"

    def read(self) -> Memory:
        return Memory(self.allocator.allocated_bytes, self.allocator.reserved_bytes, None)

    def peak(self) -> Memory:
        return Memory(self.allocator.peak_allocated_bytes, self.allocator.peak_reserved_bytes, None)

    caches = True

    def device_memory(self) -> int:
        """What the card loses: reserved, the CUDA context, modules of every library used so far, page tables of pinned memory."""
        return self.allocator.reserved_bytes + self._outside + self.tables.held_bytes

    def reset_peak(self) -> None:
        self.allocator.reset_peaks()

    def synchronize(self) -> None:
        self.clock.synchronize()

    def now(self, kind: str) -> float | None:
        """Predicted seconds."""
        return self.clock.now()

    def host(self) -> tuple[int, int]:
        """(bytes in host tensors, of which pinned): what the run itself keeps in RAM, without Python and libraries."""
        return self.host_bytes, self.pinned_bytes

    def state(self) -> Hashable | None:
        """Everything that the next allocations depend on; None where each of them is heard by somebody."""
        if self.observer is not None or self.events is not None:
            return None
        return self.allocator.state(), self.host_bytes, self.host_peak_bytes, self.pinned_bytes, len(self._loaded)

    # --- placement -------------------------------------------------------------------------------------------------------

    @contextmanager
    def on_host(self, pinned: bool = False) -> Iterator[None]:
        """Storages born inside stand for host memory."""
        before = self._placing_host, self._pinning
        self._placing_host, self._pinning = True, pinned
        try:
            yield
        finally:
            self._placing_host, self._pinning = before

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Storages born inside stand for nothing: a model's parameters before they are loaded."""
        self._ignoring = True
        try:
            yield
        finally:
            self._ignoring = False

    def is_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def load_library(self, name: str) -> None:
        """First use of a library: its modules take device memory outside the allocator."""
        if name not in self._loaded:
            self._loaded.add(name)
            nbytes = self.gpu.module_bytes.get(name, 0)
            self._outside += nbytes
            self.clock.first_use(name)
            if self.observer is not None:
                self.observer.outside(nbytes)

    def load_everything(self) -> None:
        """Every library as if used before, with its buffers: where a run stands in its later stages."""
        self.clock.leave_out_plans()
        for name in ("kernels", *self.gpu.module_bytes):
            self.load_library(name)
            for nbytes in self.libraries.persistent_buffers(name):
                self._malloc(nbytes, name + " workspace", shared=True)

    # --- dispatch --------------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch 2.13 would wrap every call, to hide it from a compiler that is not used, and import that compiler."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = self._operations.get(func)
        if known is None:
            name, is_view = str(func), bool(getattr(func, "is_view", False))
            price = None if is_view else self.clock.costs.price(name)
            known = self._operations[func] = (name, price, is_view, shortcut_of(func))
        self._operation, price, is_view, shortcut = known
        if self._ignoring:
            return self._ignore(_result(func, shortcut, args, kwargs))
        if is_view and not self._placing_host:  # half of all operations; the storage is known already
            self.clock.view()
            return func(*args, **kwargs)
        host = self._placing_host
        if self._host and not host:
            host = any(t.untyped_storage()._cdata in self._host for t in _meta_tensors((*args, *kwargs.values())))
        plan = None if host else self.libraries.plan(self._operation, args)
        before = [self._malloc(n, "before " + self._operation) for n in plan.before] if plan else []
        result = _result(func, shortcut, args, kwargs)
        for tensor in _meta_tensors((result,)):
            self._register(tensor.untyped_storage(), host, tensor)
        if plan:
            self.load_library("kernels")  # PyTorch's own kernels come with the first one launched
            self._take(plan, before)
        if price is None:
            self.clock.view()
        else:
            (self.clock.compute_on_host if host else self.clock.compute)(price, args, result)
        return result

    def _take(self, plan: BufferPlan, before: list[int]) -> None:
        """Library buffers: persistent ones at a library's first use, transient ones for the length of the call."""
        for library in plan.loads:
            if library not in self._loaded:
                self.load_library(library)
                for nbytes in self.libraries.persistent_buffers(library):
                    self._malloc(nbytes, library + " workspace", shared=True)
        transient = [self._malloc(nbytes, self._operation + " workspace") for nbytes in plan.during]
        for handle in reversed(transient):
            self._free(handle)
        for handle in reversed(before):
            self._free(handle)

    def _ignore(self, result: Any) -> Any:
        for tensor in _meta_tensors((result,)):
            storage = tensor.untyped_storage()
            self._ignored.add(storage._cdata)
            weakref.finalize(storage, self._ignored.discard, storage._cdata).atexit = False
        return result

    def _register(self, storage: torch.UntypedStorage, host: bool, tensor: torch.Tensor) -> None:
        key = storage._cdata
        if key in self._device or key in self._host or key in self._ignored or storage.nbytes() == 0:
            return
        nbytes = storage.nbytes()
        if host:
            self._host[key] = nbytes
            self.host_bytes += nbytes
            self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)
            pinned = 0
            if self._pinning:
                self._pinned.add(key)
                pinned = self._pin(nbytes)
            weakref.finalize(storage, self._forget_host, key, pinned).atexit = False
        else:
            self._device[key] = self._malloc(nbytes, self._operation, tensor)
            weakref.finalize(storage, self._forget_device, key).atexit = False

    def _forget_host(self, key: int, pinned: int) -> None:
        self.host_bytes -= self._host.pop(key)
        self._pinned.discard(key)
        if pinned:
            self._unpin(pinned)

    def _pin(self, nbytes: int) -> int:
        """Bytes that are pinned for so many."""
        self.pinned_bytes += nbytes
        self.clock.pin(nbytes)
        self._pin_changed()
        return nbytes

    def _unpin(self, nbytes: int) -> None:
        self.pinned_bytes -= nbytes
        self.clock.unpin(nbytes)
        self._pin_changed()

    def _pin_changed(self) -> None:
        """Page tables lie on the card: the allocator's cap gives way to them, as engine.cuda makes it."""
        before = self.tables.held_bytes
        self.tables.update(self.pinned_bytes)
        held = self.tables.held_bytes
        if held == before:
            return
        if self._limit is not None:
            self.allocator.limit_bytes = max(0, self._limit - held)
        if self.observer is not None:
            self.observer.outside(held - before)

    def _forget_device(self, key: int) -> None:
        self._free(self._device.pop(key))

    def _malloc(self, nbytes: int, operation: str, tensor: torch.Tensor | None = None, *, shared: bool = False) -> int:
        handle = self.allocator.malloc(nbytes, self.stream)
        self.live[handle] = (nbytes, operation)
        if self.observer is not None:
            self.observer.malloc(handle, operation, tensor, shared=shared)
        if self.events is not None:
            self.events.append(AllocationEvent(nbytes, operation, handle))
        return handle

    def _free(self, handle: int) -> None:
        nbytes, operation = self.live.pop(handle)
        self.allocator.free(handle)
        if self.observer is not None:
            self.observer.free(handle)
        if self.events is not None:
            self.events.append(AllocationEvent(-nbytes, operation, handle))


def _result(func: Any, shortcut: Shortcut | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = NotImplemented if shortcut is None else shortcut(args, kwargs)
    return func(*args, **kwargs) if result is NotImplemented else result


def _meta_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The meta tensors among an operation's arguments or results, which nest at most in lists (tree_leaves took 20 % of a run)."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _meta_tensors(value)

"""The simulated device under foreign code: every ATen operation on plain meta tensors, each storage labelled cuda, cpu or meta.

Owns: where a storage lies, what an operation makes of it (result, library buffers, values), copies between host and device.
Does not own: what Python code asks for (facade.py), whole operations that CUDA computes in one kernel (kernels.py).
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import enable_reentrant_dispatch

from wanvram.errors import OutOfMemory
from wanvram.foreign.autocast import CastLists
from wanvram.foreign.buffers import ForeignBuffers
from wanvram.foreign.errors import SimulatedOutOfMemory, UnknownOperation, Unsupported
from wanvram.foreign.layouts import alike
from wanvram.foreign.operations import DATA_SHAPED, TO_THE_HOST, AtenOp, operation_of
from wanvram.foreign.results import IN_PLACE, RULES, as_iterated, as_meta, description, key_of, made_again
from wanvram.foreign.timed_memory import TimedMemory
from wanvram.foreign.values import Values, tensors_in
from wanvram.simulate.allocator import CachingAllocator
from wanvram.simulate.clock import Clock
from wanvram.simulate.gpus import GPU
from wanvram.simulate.libraries import BufferPlan
from wanvram.units import human

__all__ = ["CPU", "CUDA", "META", "ForeignMemory"]

CUDA, CPU, META = "cuda", "cpu", "meta"  # where a storage lies; CPU: a host tensor too large to be real
# Of host and device tensors.
_ACROSS = "aten.copy_", "aten.index", "aten._index_put_impl_", "aten._to_copy", "aten.set_"
_MOST_MEMORISED = 100_000
MOST_ASSUMED = 20_000  # reads of unknown values at one place


class _Death(weakref.ref[torch.UntypedStorage]):
    """Tells of a storage's end, and whose it was; weakref.finalize takes 3 us of the 50 of an operation."""

    __slots__ = ("key",)
    key: int


class ForeignMemory(TimedMemory):
    """Dispatch mode. `placing`: where the facade wants the storages of a factory; None: where the operation's tensors are."""

    def __init__(self, gpu: GPU, allocator: CachingAllocator, buffers: ForeignBuffers, clock: Clock) -> None:
        super().__init__(gpu, allocator, buffers, clock)
        self.buffers = buffers
        self.values = Values()
        self.placing: str | None = None
        self.whole: dict[Any, Callable[..., Any]] = {}  # operations that CUDA computes in one, by OpOverload
        self.casts = CastLists(self)
        self.total_bytes = gpu.total_bytes
        self.assumed: Counter[str] = Counter()  # places that read values which only a GPU would know
        self.untaken: Counter[str] = Counter()  # operations whose buffers beside the outputs are not known
        self.said: Counter[str] = Counter()  # what was done otherwise than asked
        self.where: Callable[[], str | None] = lambda: None  # the line of the program that is running
        self.refused = 0  # allocations that did not fit
        self.peak_device_bytes = 0
        self.operations = 0
        self.closed = False
        self.shared = False  # whether threads were started
        self.lock = threading.RLock()  # then of one call of PyTorch at a time: where it puts what it makes is kept here
        self._place: dict[int, str] = {}
        self._last = CUDA  # where the operation before was
        self._foreign: dict[Any, AtenOp] = {}
        self._results: dict[Any, Any] = {}
        self._pinned_real: set[int] = set()
        self._unpinned: Counter[int] = Counter()  # sizes of pinned blocks that are free
        self._deaths: dict[int, _Death] = {}
        self._most_reserved = -1  # for which peak_device_bytes is known

    def cap(self, nbytes: int) -> None:
        """set_per_process_memory_fraction: reserved memory stays below it."""
        self.allocator.limit_bytes = self._limit = nbytes

    # --- labels ----------------------------------------------------------------------------------------------------------

    def place_of(self, tensor: torch.Tensor) -> str:
        if not tensor.is_meta:
            return tensor.device.type
        return self._place.get(tensor.untyped_storage()._cdata, META)

    @contextmanager
    def putting(self, place: str | None, pinned: bool = False) -> Iterator[None]:
        """Storages born inside lie there."""
        before = self.placing, self._pinning
        self.placing, self._pinning = place, pinned
        try:
            yield
        finally:
            self.placing, self._pinning = before

    def pinned(self, tensor: torch.Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        return key in self._pinned or key in self._pinned_real

    def pin_real(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._pinned_real:
            self._pinned_real.add(storage._cdata)
            weakref.finalize(storage, self._pinned_real.discard, storage._cdata).atexit = False

    def _born(self, tensor: torch.Tensor, place: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._place:
            return
        if place == CUDA:
            nbytes = storage.nbytes()
            if nbytes:
                self._device[key] = self._malloc(nbytes, self._operation, tensor)
        elif place == CPU:
            self._register(storage, True, tensor)
        self._place[key] = place
        death = self._deaths[key] = _Death(storage, self._died)
        death.key = key

    def close(self) -> None:
        """The run is over: what dies later changes none of its figures."""
        self.closed = True

    def _died(self, death: _Death) -> None:
        if self.closed:
            return
        key = death.key
        with self.lock:
            del self._place[key], self._deaths[key]
            self.values.forget(key)
            handle = self._device.pop(key, None)
            if handle in self._recorded:
                self._await(handle)
            elif handle is not None:
                self._free(handle)

    def _malloc(self, nbytes: int, operation: str, tensor: torch.Tensor | None = None, *, shared: bool = False) -> int:
        if self._awaited:
            self._passed(self.clock.now())
        try:
            handle = super()._malloc(nbytes, operation, tensor, shared=shared)
        except OutOfMemory as error:
            if not self._awaited:
                raise self._full(error) from None
            self.synchronize()  # as the allocator does before it gives up
            return self._malloc(nbytes, operation, tensor, shared=shared)
        if self.allocator.reserved_bytes > self._most_reserved:
            self._most_reserved = self.allocator.reserved_bytes
            self.peak_device_bytes = max(self.peak_device_bytes, self.device_memory())
        return handle

    def load_library(self, name: str) -> None:
        if name not in self._loaded:
            super().load_library(name)
            self._most_reserved = -1

    def _pin(self, nbytes: int) -> int:
        """As PyTorch's allocator of pinned memory: the next power of two, which it keeps for the next of that size."""
        size = 1 << (nbytes - 1).bit_length()
        if self._unpinned[size]:
            self._unpinned[size] -= 1
            return size
        return super()._pin(size)

    def _unpin(self, nbytes: int) -> None:
        self._unpinned[nbytes] += 1

    def _pin_changed(self) -> None:
        super()._pin_changed()
        self._most_reserved = -1

    def _full(self, error: OutOfMemory) -> SimulatedOutOfMemory:
        """In the words of PyTorch, which programs search for."""
        self.refused += 1
        allocated, reserved = self.allocator.allocated_bytes, self.allocator.reserved_bytes
        text = (
            f"CUDA out of memory. Tried to allocate {human(error.requested_bytes)}. GPU 0 has a total capacity of "
            f"{human(self.total_bytes)}. Of the allocated memory {human(allocated)} is allocated by PyTorch, and "
            f"{human(reserved - allocated)} is reserved by PyTorch but unallocated. (simulated {self.gpu.name})"
        )
        return SimulatedOutOfMemory(
            text,
            requested_bytes=error.requested_bytes,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            limit_bytes=self.total_bytes,
        )

    # --- dispatch --------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.shared:
            return self._dispatch(func, args, kwargs or {})
        with self.lock:
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operation = self._foreign.get(func)
        if operation is None:
            operation = self._foreign[func] = operation_of(func, self.buffers, self.clock.costs, self.whole)
        if operation.view is not None and self.placing is None:
            if args[0].is_meta:
                self._last = self._place.get(args[0].untyped_storage()._cdata, META)
            if self.timed:
                self.clock.view()
            return operation.view(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            elif isinstance(value, (list, tuple)):
                tensors += tensors_in(value)
        place = self._common_place(operation, tensors, kwargs)
        if place is None:
            return func(*args, **kwargs)
        if operation.composite and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._recorded_parts(func, args, kwargs)
        if place == CUDA:
            if self.casts.enabled:
                args, kwargs = self.casts(operation.name, args, kwargs) or (args, kwargs)
            if operation.whole is not None:
                return operation.whole(*args, **kwargs)
        if operation.composite:
            with self:
                return func.decompose(*args, **kwargs)
        self._operation = operation.name
        return self._run(func, operation, args, kwargs, place)

    def _recorded_parts(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """For autograd, which let the whole pass (kernels.py) and keeps of each part what it needs."""
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            self.said["attention with recorded gradients is counted as taken apart, which takes more"] += 1
        with enable_reentrant_dispatch(), self:
            return func.decompose(*args, **kwargs)

    def _common_place(self, operation: AtenOp, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> str | None:
        """None: real tensors only, or none at all and nobody asked for another place."""
        place: str | None = None
        real = False
        for tensor in tensors:
            if not tensor.is_meta:
                real = real or tensor.dim() > 0
                continue
            own = self._place.get(tensor.untyped_storage()._cdata, META)
            if place is None or own == CUDA:
                if place == CPU and own == CUDA:
                    real = True
                place = own
            elif own == CPU and place == CUDA and tensor.dim():
                real = True
        if place is None:
            made_within = not tensors and str(kwargs.get("device")) == "meta"  # by C++ for the tensors it works on
            return self.placing or (self._last if made_within else None)
        self._last = place
        apart = real and place == CUDA and self.placing is None
        if apart and not operation.composite and not operation.name.startswith(_ACROSS):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({operation.name}; simulated)"
            )
        return self.placing or place

    def _run(self, func: Any, operation: AtenOp, args: Any, kwargs: dict[str, Any], place: str) -> Any:
        name = operation.name
        if not operation.usual:
            if name == "aten.copy_.default":
                return self._copy(*args, **kwargs)
            if name in TO_THE_HOST:
                return self._read(func, args)
            if name in DATA_SHAPED or _has_mask(args):
                return self._data_shaped(func, operation, args, kwargs, place)
        self.operations += 1
        plan = self._plan(operation, args, kwargs) if operation.planned and place == CUDA else None
        before = [self._malloc(n, "before " + name) for n in plan.before] if plan else []
        result = self._result(func, operation, args, kwargs)
        for tensor in (result,) if isinstance(result, torch.Tensor) else tensors_in((result,)):
            if tensor.is_meta:
                self._born(tensor, place)
        if place == CUDA:
            if "kernels" not in self._loaded:
                self.load_library("kernels")
            if plan is not None:
                self._take(plan, before)
            if self.timed and operation.price is not None:
                self.launch(operation.price, args, result)
        if place != META:
            self._follow(func, operation, args, kwargs, result)
        return result

    def _plan(self, operation: AtenOp, args: Any, kwargs: dict[str, Any]) -> BufferPlan | None:
        plan = self.buffers.measured_plan(operation.name, args, kwargs)
        if plan is None and operation.untold:
            self.untaken[operation.name] += 1
        return self.buffers.plan(operation.name, args) if plan is None else plan

    def _follow(self, func: Any, operation: AtenOp, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Values of the result, where they are small and known; what is written with unknown ones is unknown from now on."""
        large = isinstance(result, torch.Tensor) and result.is_meta and result.untyped_storage().nbytes() > 262_144
        if not large and self.values.follow(func, args, kwargs, result):
            return
        for where in operation.writes:
            target = kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None
            for tensor in tensors_in((target,)):
                if tensor.is_meta:
                    self.values.forget(tensor.untyped_storage()._cdata)

    # --- results ---------------------------------------------------------------------------------------------------------

    def _result(self, func: Any, operation: AtenOp, args: Any, kwargs: dict[str, Any]) -> Any:
        """By PyTorch's meta kernel, or as it was for arguments of the same shapes, layouts and types."""
        if operation.own is not None:
            return operation.own(*args, **kwargs)
        key: Any = None
        if operation.memorised:
            try:
                key = (operation.name, *map(key_of, args))
                if kwargs:
                    key = (*key, *((name, key_of(value)) for name, value in kwargs.items()))
                found = self._results.get(key)
            except TypeError:
                key = found = None
            if found is not None:
                return args[0] if found is IN_PLACE else made_again(found)
        result = self._meta(func, operation, args, kwargs)
        if key is not None and len(self._results) < _MOST_MEMORISED:
            made = description(result, args)
            if made is not None:
                self._results[key] = made
        return result

    def _meta(self, func: Any, operation: AtenOp, args: Any, kwargs: dict[str, Any]) -> Any:
        ruled = RULES[operation.name](*args, **kwargs) if operation.name in RULES else NotImplemented
        if ruled is not NotImplemented:
            return ruled
        args, kwargs = as_meta(args), {name: as_meta(value) for name, value in kwargs.items()}
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type != "cpu":
            kwargs["device"] = torch.device("meta")
        if "generator" in kwargs:
            kwargs["generator"] = None
        args = tuple(None if isinstance(value, torch.Generator) else value for value in args)
        kwargs.pop("pin_memory", None)
        try:
            result = func(*args, **kwargs)
            return as_iterated(result, args) if operation.memorised and not operation.writes else result
        except NotImplementedError as error:
            raise UnknownOperation(operation.name) from error
        except RuntimeError as error:
            if operation.name.startswith("aten.") or "fake impl" not in str(error):
                raise
            raise UnknownOperation(operation.name) from None

    def _read(self, func: Any, args: Any) -> Any:
        """A value for the host: zero, said so in the gaps, where only a GPU would know it."""
        known = [self.values.of(tensor) for tensor in tensors_in(args)]
        self.synchronize()
        if any(map(self.values.assumed, tensors_in(args))) or any(value is None for value in known):
            self.assume(f"{func}")
        if all(value is not None for value in known):
            return func(*known, *args[len(known) :])
        return False if args[0].dtype == torch.bool or len(known) > 1 else 0.0 if args[0].is_floating_point() else 0

    def assume(self, operation: str) -> None:
        """Notes that unknown values were taken as zeros, and where. Raises Unsupported in a loop that such a zero never ends."""
        place = f"{operation.removesuffix('.default')} at {self.where()}"
        self.assumed[place] += 1
        if self.assumed[place] > MOST_ASSUMED:
            raise Unsupported(
                f"{place}: {MOST_ASSUMED} times a value was read that only a GPU would know, and zero was taken; "
                "a loop that waits for it would not end"
            )

    def _data_shaped(self, func: Any, operation: AtenOp, args: Any, kwargs: dict[str, Any], place: str) -> Any:
        """The shape of the result hangs on values: it is known where they are. What only writes needs none."""
        if operation.writes:
            self._follow(func, operation, args, kwargs, args[0])
            return args[0]
        if operation.name == "aten.index.Tensor":
            indices = [index if index is None else self._selected(operation, index) for index in args[1]]
            flat = [part for index in indices for part in (index if isinstance(index, tuple) else (index,))]
            result = func(args[0], as_meta(flat))
            self._born(result, place)
            self._follow(func, operation, (args[0], flat), kwargs, result)
            return result
        real = [self.values.sure(value) if isinstance(value, torch.Tensor) else value for value in args]
        if any(value is None and given is not None for value, given in zip(real, args, strict=True)):
            raise self._hangs_on_values(operation)
        found = func(*real, **kwargs)
        results = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for v in tensors_in((found,))]
        for tensor, value in zip(results, tensors_in((found,)), strict=True):
            self._born(tensor, place)
            self.values.keep(tensor, value)
        return results[0] if isinstance(found, torch.Tensor) else tuple(results)

    def _selected(self, operation: AtenOp, index: torch.Tensor) -> Any:
        """A mask as the positions that it selects, one tensor for each of its dimensions."""
        if index.dtype not in (torch.bool, torch.uint8):
            return index
        known = self.values.sure(index)
        if known is None:
            raise self._hangs_on_values(operation)
        return known.nonzero(as_tuple=True)

    def _hangs_on_values(self, operation: AtenOp) -> UnknownOperation:
        return UnknownOperation(operation.name, "the shape of its result hangs on values that only a GPU would know")

    # --- copies ----------------------------------------------------------------------------------------------------------

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """aten.copy_, within the device, within the host or between them, with the temporary tensors that CUDA's needs."""
        to, of = self.place_of(target), self.place_of(source)
        if META in (to, of) and to != of:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if target.shape != source.shape:
            source.expand(target.shape)  # raises as copy_ does
        temporary = 0
        if to != of:
            simple = target.dtype == source.dtype and alike(target, source)
            if to == CUDA and not simple and not target.is_contiguous():
                temporary = target.numel() * target.itemsize
            if of == CUDA and not simple and not source.is_contiguous():
                temporary = source.numel() * source.itemsize
            self._transfer(source, waits=not non_blocking or to == CPU)
        if CUDA in (to, of):
            self.load_library("kernels")
        if temporary:
            self._free(self._malloc(temporary, "aten.copy_ between host and device"))
        value, known = self.values.of(source), self.values.of(target)
        if known is not None and value is not None:
            known.copy_(value)
        elif target.is_meta:
            self.values.forget(target.untyped_storage()._cdata)
        elif known is not None:
            known.zero_()
            self.assume("aten.copy_ to the host")
        return target

    def _transfer(self, source: torch.Tensor, *, waits: bool) -> None:
        """Beside the computation on a stream of its own, else in its order; the host waits unless it was told not to."""
        if not self.timed:
            return
        if self.stream:
            self.clock.prefetch(source.nbytes, None)
        elif waits:
            self.clock.transfer(source.nbytes, pinned=self.pinned(source))
        else:
            self.clock.queue_copy(source.nbytes)


def _has_mask(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)

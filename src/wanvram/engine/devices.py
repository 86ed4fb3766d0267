"""The three kinds of device, and every movement of data between host and device.

`cuda` and `cpu` hold real tensors, `simulated` holds meta tensors watched by simulate.memory. Models and stages use only
this interface, so one pipeline runs on all three.
"""

from __future__ import annotations

import gc
import math
import mmap
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, ClassVar

import torch

from wanvram.errors import BudgetError, DeviceError, OutOfMemory
from wanvram.record import Copies
from wanvram.recorder.meters import CpuMeter, CudaMeter, Meter, available_ram_bytes
from wanvram.simulate.memory import SimulatedMemory
from wanvram.units import human

LIBRARY_MODULES = 80 * 2**20  # cuBLAS, cuDNN and attention kernels loaded later: 76 MiB measured on an H200

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # the driver's and PyTorch's word, cuBLAS's and cuDNN's

__all__ = ["CpuDevice", "CudaDevice", "Device", "SimulatedDevice"]


class Device:
    """What a pipeline needs of a device. `torch_device` is where tensors are created, `meter` measures it."""

    kind: str
    name: str
    torch_device: torch.device
    meter: Meter

    @contextmanager
    def session(self) -> Iterator[None]:
        """Everything that touches the device happens inside; meters that need a dispatch mode enter it here."""
        with torch.no_grad():
            yield

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        raise NotImplementedError

    def host_room(self) -> int | None:
        """Bytes of RAM that can be taken without swapping; None where the host is not this machine's."""
        return None

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """Host tensor -> new device tensor."""
        raise NotImplementedError

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Device tensor -> new host tensor; blocks until the data are there."""
        raise NotImplementedError

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copies between host and device, ordered with the computation."""
        destination.copy_(source)

    def generated_weights(self) -> None:
        """Weights would be generated on the device here: where nothing is computed, the first kernel is booked."""

    def prefetch(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Starts a host-to-device copy once `after` (a mark) has passed; returns the mark of its completion."""
        self.copy(destination, source)
        return None

    def mark(self) -> Any:
        """A mark in the computation's order, to give to `prefetch`."""
        return None

    def wait(self, mark: Any) -> None:
        """Lets later computation wait for a mark returned by `prefetch`."""

    def copies(self) -> Copies:
        """Prefetching since the start: bytes, how long it took and how long computation waited for it."""
        return Copies()

    def reader_waits(self, mark: Any) -> None:
        """Stops the calling thread until a mark returned by `prefetch` has passed."""

    def host_waits(self, mark: Any) -> None:
        """The host itself waits until a mark has passed."""
        self.reader_waits(mark)

    def send(self, host: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """Host tensor -> new device tensor by way of pinned memory, which must stay as it is until a later mark has passed."""
        return self.upload(host)

    def receive(self, passage: torch.Tensor, tensor: torch.Tensor) -> Any:
        """Starts a device tensor's copy into pinned memory, in the computation's order; returns the mark of its completion."""
        passage.copy_(tensor)
        return None

    def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copies between host tensors."""
        destination.copy_(source)

    def read_from_disk(self, nbytes: int) -> None:
        """Weights would be read from files into a pinned buffer here: where nothing is read, the time is booked."""

    def generator(self, seed: int) -> torch.Generator | None:
        return torch.Generator(self.torch_device).manual_seed(seed)

    def building(self) -> AbstractContextManager[None]:
        """Around the construction of a model on meta, whose parameters are not memory yet."""
        return nullcontext()

    def computing_on_host(self) -> AbstractContextManager[None]:
        """Around computation on host tensors, so that a simulated device books them there."""
        return nullcontext()

    def empty_cache(self) -> None:
        """Gives cached, unused memory back to the driver."""


class CpuDevice(Device):
    """Real tensors in RAM: tests and small demonstrations. Host and device are the same memory."""

    kind = "cpu"
    name = "cpu"
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.meter = CpuMeter()

    @contextmanager
    def session(self) -> Iterator[None]:
        with torch.no_grad(), self.meter:
            yield

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return host.clone()

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


class CudaDevice(Device):
    """One CUDA GPU. `limit_bytes` caps what the allocator may reserve: more is an OutOfMemory, never a spill."""

    kind = "cuda"
    _context_bytes = 0  # of this process, when the first device was made
    _capped: ClassVar[set[int]] = set()  # indices whose allocator a device of this process has capped

    def __init__(self, index: int = 0, *, limit_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                "No CUDA device can be used by this PyTorch; "
                "use --device simulated to predict without a GPU, or install a CUDA build of torch."
            )
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        self.name = "cuda:" + torch.cuda.get_device_name(index)
        self.meter = CudaMeter(index)
        outside = self._outside()
        if limit_bytes is not None:
            total = torch.cuda.mem_get_info(index)[1]
            if limit_bytes <= outside:
                raise BudgetError(
                    f"{human(limit_bytes)} cannot hold the CUDA context and libraries, which take {human(outside)} on this GPU"
                )
            torch.cuda.set_per_process_memory_fraction(min(1.0, (limit_bytes - outside) / total), index)
            self._capped.add(index)
        elif index in self._capped:  # the cap outlives its device; one that somebody else set is not ours to lift
            torch.cuda.set_per_process_memory_fraction(1.0, index)
            self._capped.discard(index)
        self.limit_bytes = limit_bytes
        self._copies = torch.cuda.Stream(index)
        self._copied = Copies()
        self._copying: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._waiting: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _outside(self) -> int:
        """What this process holds outside the allocator: the context, and the libraries once all are loaded.

        In a second run of one process the libraries are there already and must not be counted twice.
        """
        now = (self.meter.device_memory() or 0) - torch.cuda.memory_reserved(self.torch_device)
        CudaDevice._context_bytes = min(CudaDevice._context_bytes or now, now)
        return max(now, CudaDevice._context_bytes + LIBRARY_MODULES)

    @contextmanager
    def session(self) -> Iterator[None]:
        try:
            with torch.no_grad():
                yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; libraries that find no memory raise others
            if not any(sign in str(error) for sign in OUT_OF_MEMORY):
                raise
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: RuntimeError) -> OutOfMemory:
        stats = torch.cuda.memory_stats(self.torch_device)
        allocated, reserved = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
        free, total = torch.cuda.mem_get_info(self.torch_device)
        requested, limit = _requested_bytes(str(error)), self.limit_bytes or total
        wanted = f"{human(requested)} more" if requested else "memory for a library"
        others = total - free - reserved - CudaDevice._context_bytes - LIBRARY_MODULES
        # What a library takes later is not known to the byte: less than this may be our own.
        shared = f"; {human(free)} of the GPU are free, other processes hold {human(others)}" if others > 2**28 else ""
        return OutOfMemory(
            f"CUDA out of memory: {wanted} asked for with {human(allocated)} allocated and {human(reserved)} reserved of "
            f"{human(limit)}{shared}.",
            requested_bytes=requested,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            limit_bytes=limit,
        )

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        """Pinned memory is registered pages of its own: PyTorch's pinned allocator rounds up to a power of two."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not pinned or nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        pages = _own_pages(nbytes)
        tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
        tensor.zero_()  # all cores fault the pages in; left to the registration, one core does it at 1 GB/s
        self._pin(tensor)
        return tensor

    def host_room(self) -> int:
        return available_ram_bytes()

    def _pin(self, tensor: torch.Tensor) -> None:
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        if code != 0:
            raise DeviceError(
                f"{human(nbytes)} of RAM could not be pinned (CUDA error {code}; {human(self.meter.pinned_bytes)} are "  # type: ignore[attr-defined]
                "pinned already); use --weights_in pageable or disk"
            )
        self.meter.pinned_bytes += nbytes  # type: ignore[attr-defined]
        weakref.finalize(tensor.untyped_storage(), self._unpin, address, nbytes).atexit = False

    def _unpin(self, address: int, nbytes: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)
        self.meter.pinned_bytes -= nbytes  # type: ignore[attr-defined]

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.torch_device)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def prefetch(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            start.record()
            destination.copy_(source, non_blocking=True)
            end.record()
        self._copying.append((source.nbytes, start, end))
        return end

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.torch_device).record_event()

    def wait(self, mark: Any) -> None:
        """The time between two events around the wait is how long the computation stood still."""
        if mark is None:
            return
        stream = torch.cuda.current_stream(self.torch_device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(mark)
        after.record(stream)
        self._waiting.append((before, after))

    def copies(self) -> Copies:
        copied = self._copying[:]  # a reading thread may start others meanwhile, which have not ended
        torch.cuda.synchronize(self.torch_device)
        nbytes = sum(n for n, _, _ in copied)
        seconds = sum(start.elapsed_time(end) for _, start, end in copied) / 1000
        stalled = sum(before.elapsed_time(after) for before, after in self._waiting) / 1000
        del self._copying[: len(copied)]
        self._waiting.clear()
        self._copied += Copies(nbytes, seconds, stalled)
        return self._copied

    def reader_waits(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    def send(self, host: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        return passage.copy_(host).to(self.torch_device, non_blocking=True)

    def receive(self, passage: torch.Tensor, tensor: torch.Tensor) -> Any:
        passage.copy_(tensor, non_blocking=True)
        return self.mark()

    def empty_cache(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def _own_pages(nbytes: int) -> mmap.mmap:
    """Anonymous memory, on Linux in huge pages, which fault in and are pinned several times as fast.

    Private, because shared memory gets huge pages only where the system was told so. Not inherited by child processes: a
    page written while a child still shares it is moved, and the device would go on with the old one.
    """
    if sys.platform != "linux":
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(advice)
    return pages


def _requested_bytes(message: str) -> int:
    """`CUDA out of memory. Tried to allocate 1.41 GiB. GPU 0 has ...` -> bytes; 0 when the message has no figure."""
    found = re.search(r"Tried to allocate ([0-9.]+) (bytes|[KMG]iB)", message)
    if found is None:
        return 0
    return int(float(found[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]])


class SimulatedDevice(Device):
    """Meta tensors and an allocator model: sizes and lifetimes without data. Host tensors are meta tensors too."""

    kind = "simulated"
    torch_device = torch.device("meta")

    def __init__(self, memory: SimulatedMemory) -> None:
        self.memory = memory
        self.meter = memory
        self.clock = memory.clock
        self.name = memory.device_name

    @contextmanager
    def session(self) -> Iterator[None]:
        with torch.no_grad(), self.memory:
            yield

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        with self.memory.on_host(pinned):
            return torch.empty(shape, dtype=dtype, device="meta")

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        result = torch.empty(host.shape, dtype=host.dtype, device="meta")
        self.clock.transfer(result.nbytes, pinned=self.memory.is_pinned(host))
        return result

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.memory.on_host():
            result = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self.clock.transfer(result.nbytes, pinned=False)
        return result

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        _check_shapes(destination, source)
        host = destination if self.memory.is_host(destination) else source
        self.clock.transfer(source.nbytes, pinned=self.memory.is_pinned(host))

    def prefetch(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        _check_shapes(destination, source)
        return self.clock.prefetch(source.nbytes, after)

    def mark(self) -> Any:
        return self.clock.mark()

    def wait(self, mark: Any) -> None:
        if mark is not None:
            self.clock.wait(mark)

    def copies(self) -> Copies:
        return self.clock.copied

    def reader_waits(self, mark: Any) -> None:
        """Only the thread that reads weights waits so; here it is a timeline of the clock."""
        if mark is not None:
            self.clock.reader_waits(mark)

    def host_waits(self, mark: Any) -> None:
        if mark is not None:
            self.clock.host_waits(mark)

    def send(self, host: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        result = torch.empty(host.shape, dtype=host.dtype, device="meta")
        self.clock.copy_on_host(result.nbytes)
        self.clock.queue_copy(result.nbytes)
        return result

    def receive(self, passage: torch.Tensor, tensor: torch.Tensor) -> Any:
        _check_shapes(passage, tensor)
        self.clock.queue_copy(passage.nbytes)
        return self.clock.mark()

    def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Into a pinned buffer the reading thread copies, beside the computation; anything else the host itself."""
        _check_shapes(destination, source)
        if self.memory.is_pinned(destination):
            self.clock.read_from_ram(source.nbytes)
        else:
            self.clock.copy_on_host(source.nbytes)

    def read_from_disk(self, nbytes: int) -> None:
        self.clock.read_from_disk(nbytes)

    def generated_weights(self) -> None:
        self.memory.load_library("kernels")

    def generator(self, seed: int) -> torch.Generator | None:
        return None

    def building(self) -> AbstractContextManager[None]:
        return self.memory.ignoring()

    def computing_on_host(self) -> AbstractContextManager[None]:
        return self.memory.on_host()

    def empty_cache(self) -> None:
        gc.collect()
        self.memory.allocator.empty_cache()


def _check_shapes(destination: torch.Tensor, source: torch.Tensor) -> None:
    if destination.shape != source.shape:
        raise AssertionError(f"copy of {tuple(source.shape)} into {tuple(destination.shape)}")

"""One CUDA GPU as a device: its cap, pinned host memory, copies beside the computation, and what its errors mean."""

from __future__ import annotations

import gc
import math
import mmap
import re
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from wanvram.engine.devices import Device
from wanvram.engine.peers import Peers, TorchPeers
from wanvram.engine.symmetric import Room, SymmetricPeers
from wanvram.errors import BudgetError, DeviceError, OutOfMemory
from wanvram.knobs import WEIGHTS_IN
from wanvram.machine.driver import LATER_BYTES
from wanvram.machine.host import available_ram_bytes
from wanvram.recorder.meters import CudaMeter
from wanvram.sharing import WEIGHTS, WORLD, meetings
from wanvram.simulate.links import WEIGHT_CHANNELS
from wanvram.spans import Copies
from wanvram.units import human

__all__ = ["CudaDevice", "own_pages"]

MOST_WAITS = 1000  # whose events are kept: rows make 3000 a step, and every event takes memory of the driver
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # the driver's and PyTorch's word, cuBLAS's and cuDNN's


class CudaDevice(Device):
    """One CUDA GPU. `limit_bytes` is what the card may lose to this process: more is an OutOfMemory, never a spill."""

    kind = "cuda"
    copies_beside = True
    exchanges_by_copies = False  # with other GPUs, out of each other's memory; set before the first exchange
    meter: CudaMeter
    _capped: ClassVar[set[int]] = set()  # indices whose allocator a device of this process has capped

    def __init__(self, index: int = 0, *, limit_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                "No CUDA device can be used by this PyTorch; "
                "use --device simulated to predict without a GPU, or install a CUDA build of torch."
            )
        self.meter = CudaMeter(index)  # first: what is used before the context exists is not ours
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        self.name = self.meter.device_name
        self.limit_bytes = limit_bytes
        # PyTorch makes a pool of streams with the first, 70 MiB outside the allocator.
        self._copies = torch.cuda.Stream(index)
        self._gathers: torch.cuda.Stream | None = None
        self._rooms: dict[tuple[Any, ...], Room] = {}
        self._copied = Copies()
        self._copying: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._waiting: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        torch.cuda.synchronize(index)
        if limit_bytes is not None:
            self.hold_to_limit()
        elif index in self._capped:  # the cap outlives its device; one that somebody else set is not ours to lift
            torch.cuda.set_per_process_memory_fraction(1.0, index)
            self._capped.discard(index)

    def hold_to_limit(self) -> None:
        """Caps the allocator at the limit less what lies outside it now; again whenever that has grown. BudgetError: no room."""
        if self.limit_bytes is None:
            return
        held = self.meter.tables.held_bytes
        outside = (self.meter.device_memory() or 0) - torch.cuda.memory_reserved(self.torch_device)
        self._libraries = max(0, outside - held) + LATER_BYTES
        self._cap(held)

    def allocator_limit(self) -> int | None:
        """What PyTorch's allocator may reserve, as PyTorch itself says it, bytes; None where it has no cap."""
        fraction = torch.cuda.get_per_process_memory_fraction(self.torch_device)
        total = torch.cuda.mem_get_info(self.torch_device)[1]
        return int(fraction * total) if fraction < 1.0 else None

    def _cap(self, tables: int) -> int:
        """The allocator's cap, bytes, with so many bytes of page tables beside the context and libraries."""
        assert self.limit_bytes is not None
        outside = self._libraries + tables
        if self.limit_bytes <= outside:
            raise BudgetError(
                f"{human(self.limit_bytes)} cannot hold the CUDA context and libraries, which take {human(outside)} on this GPU"
            )
        index = self.torch_device.index
        total = torch.cuda.mem_get_info(index)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (self.limit_bytes - outside) / total), index)
        self._capped.add(index)
        return self.limit_bytes - outside

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
        others = self.meter.used_by_others()
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
        pages = own_pages(nbytes)
        tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
        tensor.zero_()  # all cores fault the pages in; left to the registration, one core does it at 1 GB/s
        self._pin(tensor)
        return tensor

    def host_room(self) -> int:
        return available_ram_bytes()

    def _pin(self, tensor: torch.Tensor) -> None:
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        self._make_room_for_tables(nbytes)
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        if code != 0:
            raise DeviceError(
                f"{human(nbytes)} of RAM could not be pinned (CUDA error {code}; {human(self.meter.pinned_bytes)} are "
                f"pinned already); use {WEIGHTS_IN.asked('pageable')} or disk"
            )
        self.meter.pinned(nbytes)
        weakref.finalize(tensor.untyped_storage(), self._unpin, address, nbytes).atexit = False

    def _unpin(self, address: int, nbytes: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)
        self.meter.pinned(-nbytes)

    def _make_room_for_tables(self, nbytes: int) -> None:
        """The driver's page tables for pinned memory lie on the card and count: the cap gives way to them before they come."""
        tables = self.meter.tables
        grown = tables.grown(self.meter.pinned_bytes + nbytes)
        if self.limit_bytes is None or grown == tables.held_bytes:
            return
        cap = self._cap(grown)
        if torch.cuda.memory_reserved(self.torch_device) > cap:
            self.empty_cache()
        if torch.cuda.memory_reserved(self.torch_device) > cap:
            raise self._out_of_memory(RuntimeError(f"Tried to allocate {grown - tables.held_bytes} bytes"))

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.torch_device)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def prefetch(self, destination: torch.Tensor, source: torch.Tensor, *after: Any) -> Any:
        return self._copy_beside(self._copies, destination, source, after)

    def write_back(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        return self._copy_beside(self._returns, destination, source, (after,))

    @cached_property
    def _returns(self) -> torch.cuda.Stream:
        """Its own: the link carries both directions at once."""
        return torch.cuda.Stream(self.torch_device)

    def _copy_beside(
        self, stream: torch.cuda.Stream, destination: torch.Tensor, source: torch.Tensor, after: tuple[Any, ...]
    ) -> torch.cuda.Event:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for mark in after:
                if mark is not None:
                    stream.wait_event(mark)
            start.record()
            destination.copy_(source, non_blocking=True)
            end.record()
        self._copying.append((source.nbytes, start, end))
        return end

    def connect(self, *, weights: bool) -> None:
        if self.exchanges_by_copies:
            for (_, use), axis in meetings(self.place, weights=weights).items():
                SymmetricPeers(self.place, axis, rooms=self._rooms, use=use).open(self.torch_device)
        super().connect(weights=weights)

    def peers(self, axis: str) -> Peers:
        if not self.exchanges_by_copies:
            return super().peers(axis)
        return SymmetricPeers(self.place, axis, self._exchanged, rooms=self._rooms)

    def _weight_connections(self) -> Peers:
        """Few channels are enough, and take 12 MiB each for every peer."""
        if self.exchanges_by_copies:
            return SymmetricPeers(self.place, WORLD, self._exchanged, rooms=self._rooms, use=WEIGHTS)
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = WEIGHT_CHANNELS
        group = dist.new_group(backend="nccl", pg_options=options, device_id=self.torch_device)
        return TorchPeers(self.place, WORLD, self._exchanged, group)

    def gather_beside(self, peers: Peers, whole: torch.Tensor, after: Any) -> Any:
        """On a stream of its own, so that it waits for its mark only and no copy waits for it."""
        self._gathers = self._gathers or torch.cuda.Stream(self.torch_device, priority=-1)
        with torch.cuda.stream(self._gathers):
            if after is not None:
                self._gathers.wait_event(after)
            super().gather_beside(peers, whole, after)
            return self._gathers.record_event()

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
        if len(self._waiting) > MOST_WAITS:
            self._count(ended=True)

    def copies(self) -> Copies:
        """A reading thread may start others meanwhile, which have not ended."""
        copied = len(self._copying)
        torch.cuda.synchronize(self.torch_device)
        self._count(copied)
        return self._copied

    def _count(self, most: int | None = None, *, ended: bool = False) -> None:
        """Adds the events of the first `most` copies and of the waits to the sum. ended: only as far as these have passed."""
        while self._copying and most != 0 and (not ended or self._copying[0][2].query()):
            nbytes, start, end = self._copying.popleft()
            self._copied += Copies(nbytes, start.elapsed_time(end) / 1000)
            most = None if most is None else most - 1
        while self._waiting and (not ended or self._waiting[0][1].query()):
            before, after = self._waiting.popleft()
            self._copied += Copies(stalled_seconds=before.elapsed_time(after) / 1000)

    def reader_waits(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    def send(self, host: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        self.copy_on_host(passage, host)
        return passage.to(self.torch_device, non_blocking=True)

    def receive(self, passage: torch.Tensor, tensor: torch.Tensor) -> Any:
        passage.copy_(tensor, non_blocking=True)
        return self.mark()

    def empty_cache(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def own_pages(nbytes: int) -> mmap.mmap:
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

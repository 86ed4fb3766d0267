"""A tensor in a file, and the threads that read pieces of it and convert them where its numbers are of another type.

One thread reads and converts 1 GB/s on the machine of an H200 and several go side by side, while PyTorch's own threads, which meet after
every piece, do 0.6 to 3 GB/s on its 16 cores, as busy as the host is (benchmarks/2026-11-28_h200_wall_clock*.json). Each holds one piece.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from wanvram.errors import CheckpointError

__all__ = ["PIECE_BYTES", "THREADS", "Shape", "Stored", "in_memory_order", "memory_order", "opened", "start_threads"]

Shape = tuple[int, ...]
_Result = TypeVar("_Result")

PIECE_BYTES = 4 * 2**20  # stays in the cache between read and conversion: 1.6 times as fast as 64 MiB
MOST_THREADS = 8
THREADS = min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: contiguous, in the machine's byte order, from byte `offset`.

    scale: float32 [rows]; the values are then what is stored times the scale of their row.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape
    scale: Stored | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.rows)

    def read(self, dest: Tensor, row: int = 0) -> None:
        """Fills `dest` (contiguous, on the host, of this dtype) with the rows from `row` on."""
        view = dest.detach().reshape(-1).view(torch.uint8).numpy().data
        with opened(self.path) as file:
            file.seek(self.offset + row * self.row_bytes)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path} became shorter while it was read")
                view = view[count:]

    def fill(self, dest: Tensor, row: int = 0) -> None:
        """As many rows as `dest` has, from `row` on, converted. What fails is raised once no thread works on it any more."""
        rows = dest if dest.dim() else dest.unsqueeze(0)
        scales, on_host, count = self.scales(), dest.device.type == "cpu", rows.shape[0]
        step = max(1, min(count, PIECE_BYTES // max(1, self.row_bytes)))
        pieces = [slice(first, min(first + step, count)) for first in range(0, count, step)]

        def piece(where: slice) -> tuple[Tensor, Tensor] | None:
            with torch.no_grad():
                part = rows[where]
                if on_host and scales is None and part.dtype == self.dtype and part.is_contiguous():
                    self.read(part, row + where.start)
                    return None
                staging = _staging((where.stop - where.start) * self.row_bytes).view(self.dtype)
                values = staging.view(where.stop - where.start, *self.shape[1:])
                self.read(values, row + where.start)
                values = values if scales is None else values.float() * scales[row + where.start : row + where.stop]
                if on_host:
                    part.copy_(values)
                    return None
                return part, in_memory_order(part, values)

        with torch.no_grad():
            for ready in _side_by_side(piece, pieces):
                if ready is not None:  # to the device on the stream of the thread that asked
                    part, values = ready
                    part.permute(memory_order(part)).copy_(values)

    def scales(self) -> Tensor | None:
        """[rows, 1] float32, or None where the values are stored as they are."""
        if self.scale is None:
            return None
        scales = torch.empty(self.scale.shape)
        self.scale.read(scales)
        return scales.unsqueeze(1)


def memory_order(x: Tensor) -> list[int]:
    """x's dimensions from the outermost in memory to the innermost: permuted so, a channels_last tensor is contiguous."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def in_memory_order(dest: Tensor, values: Tensor) -> Tensor:
    """A copy of the values as `dest` will hold them, so that the device holds nothing beside its own tensor."""
    order = memory_order(dest)
    permuted = values.permute(order)
    return torch.empty(permuted.shape, dtype=dest.dtype).copy_(permuted)


def opened(path: Path) -> FileIO:
    """Raises CheckpointError if the file is gone."""
    try:
        return FileIO(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read any more ({error.strerror})") from error


# --- threads -----------------------------------------------------------------------------------------------------------------

_own = threading.local()


def _staging(nbytes: int) -> Tensor:
    """uint8 [nbytes] of this thread. One for all tensors: allocated anew for each, it would leave holes in the heap (100 MiB
    after a 1.3B transformer)."""
    kept: Tensor | None = getattr(_own, "staging", None)
    if kept is None or kept.numel() < nbytes:
        kept = _own.staging = torch.empty(max(nbytes, PIECE_BYTES), dtype=torch.uint8)
    return kept[:nbytes]


def _side_by_side(work: Callable[[slice], _Result], pieces: Sequence[slice]) -> Iterator[_Result]:
    """The results in order; never more than THREADS pieces beyond the one that is asked for are begun."""
    coming: deque[Future[_Result]] = deque()
    try:
        for piece in pieces:
            coming.append(start_threads().submit(work, piece))
            if len(coming) > THREADS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        wait(coming)  # the caller's tensor may go away


@cache
def start_threads() -> ThreadPoolExecutor:
    """Those that read, for the whole process; each converts on one core."""
    before, all_here = torch.get_num_threads(), threading.Barrier(THREADS + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that PyTorch has not met yet
        all_here.wait()

    threads = ThreadPoolExecutor(THREADS, "weights")
    begun = [threads.submit(begin) for _ in range(THREADS)]
    all_here.wait()
    wait(begun)
    torch.set_num_threads(before)
    return threads


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=start_threads.cache_clear)

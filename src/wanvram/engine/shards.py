"""Weights that ranks share: each keeps an equal run of bytes of every flat buffer, and all of them gather it where it is used.

A run begins where it likes, in the middle of a row too. What is read for it from files are the rows it touches and no others.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from wanvram.engine.devices import Device
from wanvram.engine.layout import ALIGNMENT_BYTES, Layout, TensorPlace
from wanvram.engine.packing import Packing
from wanvram.engine.peers import Peers
from wanvram.engine.streaming import Home, Later
from wanvram.kernels.scaled_products import SCALE_SUFFIX
from wanvram.weights.sources import TensorSource

__all__ = ["WHOLE", "Shard", "ShardHome", "fill_run", "touched"]


@dataclass(frozen=True)
class Shard:
    """Run `index` of `count` of equal length of every flat buffer, which is made a little longer where they do not divide it."""

    index: int = 0
    count: int = 1

    def run_bytes(self, nbytes: int) -> int:
        """Of one run of a buffer of `nbytes`."""
        return -(-nbytes // (self.count * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES

    def whole_bytes(self, nbytes: int) -> int:
        """Of the buffer that holds all runs."""
        return self.count * self.run_bytes(nbytes)

    def start(self, nbytes: int) -> int:
        return self.index * self.run_bytes(nbytes)

    def mine(self, flat: torch.Tensor) -> torch.Tensor:
        """flat [whole_bytes] uint8 -> my run of it."""
        each = flat.nbytes // self.count
        return flat.narrow(0, self.index * each, each)


WHOLE = Shard()


@dataclass(eq=False)
class ShardHome:
    """`home` has this rank's run of every piece; the others' come from their ranks into the same slot.

    All ranks ask for the same pieces in the same order. Where a thread reads, the gathering waits until the piece is walked to:
    ranks must not start theirs in the order of their disks.
    """

    device: Device
    home: Home
    shard: Shard
    peers: Peers
    _last: Any = None

    @property
    def marks(self) -> list[Any]:
        return self.home.marks

    def fetch(self, piece: Any, slot: torch.Tensor, after: Any) -> Any:
        there = self.home.fetch(piece, self.shard.mine(slot), after)
        if isinstance(there, Future):
            return Later(there, partial(self.gather, slot))
        return self.gather(slot, there)

    def gather(self, slot: torch.Tensor, there: Any) -> Any:
        """Starts once the mark `there` of the own run has passed; returns the mark of the whole."""
        self._last = self.device.gather_beside(self.peers, slot, there)
        return self._last

    def close(self) -> None:
        self.device.reader_waits(self._last)  # in order: the last one's end is everyone's
        self.home.close()


# --- reading a run -----------------------------------------------------------------------------------------------------------


def fill_run(layout: Layout, run: torch.Tensor, start: int, source: TensorSource) -> None:
    """Bytes start... of the flat buffer `layout` from the source, which has the same names, into `run`."""
    for place in layout.places:
        begin, end = max(start, place.offset), min(start + run.nbytes, place.offset + place.nbytes)
        if begin >= end:
            continue
        part = run.narrow(0, begin - start, end - begin)
        if part.nbytes == place.nbytes:
            source.fill(place.name, place.view(part))
        else:
            _fill_part(place, part, begin - place.offset, source)


def _fill_part(place: TensorPlace, part: torch.Tensor, begin: int, source: TensorSource) -> None:
    """Bytes begin... of one tensor. Whole rows go where they belong, the row at either end by way of the host."""
    row, end = place.row_bytes, begin + part.nbytes
    first, last = -(-begin // row), end // row
    if first < last:
        source.fill_rows(place.name, place.rows(part.narrow(0, first * row - begin, (last - first) * row)), first)
    for cut in sorted({begin // row, (end - 1) // row} - set(range(first, last))):
        whole = torch.empty(row, dtype=torch.uint8)
        source.fill_rows(place.name, place.rows(whole), cut)
        low, high = max(begin, cut * row), min(end, (cut + 1) * row)
        part.narrow(0, low - begin, high - low).copy_(whole.narrow(0, low - cut * row, high - low))


def touched(packing: Packing, start: int, nbytes: int) -> set[str]:
    """Names of the plain tensors of which something is stored in these bytes: a matrix also for its scales."""
    overlapping = (p for p in packing.stored.places if p.offset < start + nbytes and start < p.offset + p.nbytes)
    return {place.name.removesuffix(SCALE_SUFFIX) for place in overlapping}

"""How fast this machine reads and converts a checkpoint: a sample of its own files is read, because drives differ by factors
(two virtual disks of one kind of machine: 0.7 and 4 GB/s) and so do processors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from wanvram.weights.sources import FileSource
from wanvram.weights.stored import Stored, start_threads

__all__ = ["ReadingSpeed", "largest_matrices", "reading_speed"]

SAMPLE_BYTES = 256 * 2**20  # 0.4 s at 0.7 GB/s, less than a tenth of a percent of an hour's run


@dataclass(frozen=True)
class ReadingSpeed:
    """Bytes of the files per second. first_bytes: at the first touch, from wherever they lay. convert_bytes: None where nothing
    is converted."""

    first_bytes: float
    cached_bytes: float
    convert_bytes: float | None


def largest_matrices(source: FileSource) -> Iterator[Stored]:
    """The matrices that lie in a file as they are, in the source's order, of at least half the largest one's size."""
    found = [stored for key in source.keys() if (stored := source.stored(key)) is not None and len(stored.shape) == 2]  # noqa: SIM118
    largest = max((stored.nbytes for stored in found), default=0)
    yield from (stored for stored in found if 2 * stored.nbytes >= largest)


def reading_speed(source: FileSource, wanted: torch.dtype, sample_bytes: int = SAMPLE_BYTES) -> ReadingSpeed | None:
    """Reads matrices from all over the files twice, and once more with conversion to `wanted` where they are stored otherwise.

    None where the source holds too little for a sample. Raises CheckpointError if the files cannot be read any more.
    """
    matrices = list(largest_matrices(source))
    if not matrices or sum(stored.nbytes for stored in matrices) < sample_bytes:
        return None
    count = max(1, sample_bytes // max(stored.nbytes for stored in matrices))
    sample = [matrices[index * len(matrices) // count] for index in range(count)]
    plain = _room(max(stored.nbytes for stored in sample))
    start_threads()
    first, cached = (_rate(sample, plain, None) for _ in range(2))
    if all(stored.dtype == wanted for stored in sample):
        return ReadingSpeed(first, max(first, cached), None)
    room = _room(max(stored.nbytes // stored.dtype.itemsize for stored in sample) * wanted.itemsize)
    both = _rate(sample, room, wanted)
    return ReadingSpeed(first, max(first, cached), 1 / max(1 / both - 1 / cached, 1e-12))


def _room(nbytes: int) -> torch.Tensor:
    """Whose pages are there before the clock runs."""
    return torch.empty(nbytes, dtype=torch.uint8).fill_(1)


def _rate(sample: Sequence[Stored], room: torch.Tensor, wanted: torch.dtype | None) -> float:
    begun = time.perf_counter()
    for stored in sample:
        dtype = wanted or stored.dtype
        stored.fill(room[: stored.nbytes // stored.dtype.itemsize * dtype.itemsize].view(dtype).view(stored.shape))
    return sum(stored.nbytes for stored in sample) / (time.perf_counter() - begun)

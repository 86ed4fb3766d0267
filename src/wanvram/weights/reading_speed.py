"""How fast this machine reads and converts a checkpoint: a sample of its own files is read, because drives differ by factors
(two virtual disks of one kind of machine: 0.7 and 4 GB/s) and so do processors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from wanvram.weights.sources import FileSource
from wanvram.weights.stored import Stored, start_threads

__all__ = ["ReadingSpeed", "largest_matrices", "reading_speed"]

SAMPLE_BYTES = 256 * 2**20  # of files: 0.4 s at 0.7 GB/s


@dataclass(frozen=True)
class ReadingSpeed:
    """Bytes of the files per second. first: at the first touch, from wherever they lay; the others from the page cache.

    taken: into memory just taken, as weights are loaded; used: into memory written before, as they are streamed.
    """

    first: float
    taken: float
    used: float


def largest_matrices(source: FileSource) -> list[Stored]:
    """Those that lie in a file as they are, in the source's order, of at least half the largest one's size."""
    found = [stored for key in source.keys() if (stored := source.stored(key)) is not None and len(stored.shape) == 2]  # noqa: SIM118
    largest = max((stored.nbytes for stored in found), default=0)
    return [stored for stored in found if 2 * stored.nbytes >= largest]


def reading_speed(
    matrices: Sequence[Stored], wanted: torch.dtype, room: torch.Tensor, sample_bytes: int = SAMPLE_BYTES
) -> ReadingSpeed | None:
    """Some of the matrices, from all over the files, read into `wanted`, again and again until `room` is full, and once more.

    room: uint8, several times sample_bytes, just taken; more than a processor's cache holds, as weights are. None where the
    matrices are too few for a sample or the room is too small. Raises CheckpointError if the files cannot be read any more.
    """
    largest = max((stored.nbytes for stored in matrices), default=0)
    if sum(stored.nbytes for stored in matrices) < sample_bytes or largest == 0:
        return None
    count = max(1, sample_bytes // largest)
    sample = [matrices[index * len(matrices) // count] for index in range(count)]
    places = list(_places(sample, wanted, room))
    if len(places) < 2 * count:
        return None
    start_threads()
    first, taken = _rate(places[:count]), _rate(places[count:])
    return ReadingSpeed(first, taken, _rate(places))


def _places(sample: Sequence[Stored], wanted: torch.dtype, room: torch.Tensor) -> Iterator[tuple[Stored, torch.Tensor]]:
    """The sample's matrices in turn, each with the next part of the room that holds it."""
    start = 0
    for stored in cycle(sample):
        nbytes = stored.nbytes // stored.dtype.itemsize * wanted.itemsize
        if start + nbytes > room.numel():
            return
        yield stored, room[start : start + nbytes].view(wanted).view(stored.shape)
        start += nbytes


def _rate(places: Sequence[tuple[Stored, torch.Tensor]]) -> float:
    begun = time.perf_counter()
    for stored, place in places:
        stored.fill(place)
    return sum(stored.nbytes for stored, _ in places) / (time.perf_counter() - begun)

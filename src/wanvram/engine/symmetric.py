"""Exchanges between GPUs of one host by copies out of each other's memory, in place of NCCL: no kernels, and no memory but a buffer.

torch.distributed._symmetric_memory over a gloo group. On two H200s it takes nothing outside the allocator beyond the buffer itself
(NCCL: 566 MiB with 8 channels) and copies 194 MB in 0.53 ms (1.40), without the multiprocessors. The module is private to PyTorch, so
it is looked at before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wanvram.engine.peers import TorchPeers
from wanvram.engine.stream_signals import COUNT_BYTES, Kind, StreamSignals, commands_are_missing
from wanvram.errors import DeviceError
from wanvram.knobs import MAX_GPUS
from wanvram.sharing import BUFFER_BYTES, PASSING

__all__ = ["Room", "SymmetricPeers", "what_is_missing"]

MODULE = "torch.distributed._symmetric_memory"
_ALIGNED = 256
_PAGE = len(Kind) * MAX_GPUS * COUNT_BYTES
_HALF = (BUFFER_BYTES - _PAGE) // 2 // _ALIGNED * _ALIGNED


def what_is_missing(gpus: int) -> str | None:
    """A clause that says why the first `gpus` cards of this host cannot exchange so; None: they can."""
    if torch.cuda.device_count() < gpus:
        return "a process sees fewer GPUs than the run has on this host"
    pairs = [(a, b) for a in range(gpus) for b in range(gpus) if a != b]
    if not all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs):
        return "the GPUs have no access to each other's memory"
    try:
        module = import_module(MODULE)
    except ImportError:
        return f"this PyTorch has no {MODULE}"
    handle = getattr(module, "_SymmetricMemory", None)
    needed = [(module, "empty"), (module, "rendezvous"), (handle, "get_buffer"), (handle, "barrier")]
    absent = [name for owner, name in needed if not hasattr(owner, name)]
    if absent:
        return f"{MODULE} of this PyTorch has no {', '.join(absent)}"
    return "the driver has no commands by which streams wait for memory" if commands_are_missing() else None


class Room:
    """A buffer of each of some ranks that all of them read, in two halves: while one is read, the other is written. What is larger
    than that goes in rounds.

    All members make it, and use it, at the same places of their runs.
    """

    def __init__(self, ranks: Sequence[int], index: int, device: torch.device) -> None:
        module = import_module(MODULE)
        group = dist.group.WORLD
        if len(ranks) != dist.get_world_size():
            group = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        assert group is not None
        self._memory = module.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
        handle = module.rendezvous(self._memory, group.group_name)
        self._buffers = [handle.get_buffer(n, (BUFFER_BYTES,), torch.uint8) for n in range(len(ranks))]
        self._index, self._round = index, 0
        pages = [buffer[2 * _HALF :] for buffer in self._buffers]
        pages[index].zero_()
        handle.barrier()  # nobody counts in a page before it is zeros
        self._signals = StreamSignals(pages, index)
        self.stream: Any = None  # of those who do not let the computation wait
        self.largest: int | None = None  # bytes that any of them ever passes on

    def swap(
        self, out: Sequence[Tensor], into: Sequence[tuple[int, int, Tensor]], largest: int, beside: Any = None
    ) -> None:
        """Puts `out`, one for each place, where all can read it; copies (member, place, target) from there. Bytes, flat.

        largest: bytes of the largest part that any member puts down, the same number for all of them. beside: a stream for what is
        read, after what the current one does by now. What is put down is copied by multiprocessors, which a long kernel would have
        it wait for on another stream; copies between GPUs and counts need none.
        """
        slot = _HALF // max(1, len(out)) // _ALIGNED * _ALIGNED
        computing = self._signals.stream()
        if self.stream is not None and beside is None:
            computing.wait_stream(self.stream)  # rounds are counted in their order
        for start in range(0, largest, slot):
            self._round += 1
            base, mine = self._round % 2 * _HALF, self._buffers[self._index]
            self._signals.wait(Kind.TAKEN, self._round - 2, computing)
            for place, part in enumerate(out):
                _copy(mine, base + place * slot, _cut(part, start, slot))
            with _on(beside, computing) as reading:
                self._signals.tell(Kind.PUT, self._round, reading)
                self._signals.wait(Kind.PUT, self._round, reading)
                for member, place, target in into:
                    piece = _cut(target, start, slot)
                    piece.copy_(self._buffers[member].narrow(0, base + place * slot, piece.numel()), non_blocking=True)
                self._signals.tell(Kind.TAKEN, self._round, reading)

    def prove(self) -> None:
        """Raises DeviceError where what another member put down is not what is read there; both halves, with all members."""
        device, others = self._buffers[0].device, [n for n in range(len(self._buffers)) if n != self._index]
        for _ in range(2):
            mine = torch.full((_ALIGNED,), 1 + self._index, dtype=torch.uint8, device=device)
            found = [torch.zeros_like(mine) for _ in others]
            self.swap([mine], [(n, 0, target) for n, target in zip(others, found, strict=True)], len(mine))
            if not all(bool((target == 1 + n).all()) for n, target in zip(others, found, strict=True)):
                raise DeviceError("copies between the GPUs brought other bytes than were sent; use --exchange_by nccl")


@contextmanager
def _on(stream: Any, computing: Any) -> Iterator[Any]:
    """On that stream, after what the computing one does by now; without one, on the computing one."""
    if stream is None:
        yield computing
        return
    stream.wait_stream(computing)
    with torch.cuda.stream(stream):
        yield stream


def _cut(part: Tensor, start: int, length: int) -> Tensor:
    """Bytes start... of a part, as many as there are of `length`."""
    return part if start == 0 and part.numel() <= length else part[start : start + length]


def _copy(buffer: Tensor, start: int, part: Tensor) -> None:
    buffer.narrow(0, start, part.numel()).copy_(part, non_blocking=True)


@dataclass
class SymmetricPeers(TorchPeers):
    """Host tensors go by gloo as ever. rooms: of the device, by ranks and use. use: why it must not stand in the way of others."""

    rooms: dict[tuple[Any, ...], Room] = field(default_factory=dict)
    use: str = ""

    def exchange(
        self, received: Tensor, sent: Tensor, received_counts: Sequence[int], sent_counts: Sequence[int]
    ) -> Any:
        """Parts are rows x heads, so that the largest of any rank follows from what this one sends and receives."""
        if not sent.is_cuda:
            self._exchange(received, sent, received_counts, sent_counts)
            return []
        room = self._room(self.use)
        room.stream = room.stream or torch.cuda.Stream(sent.device, priority=-1)
        self._exchange(received, sent, received_counts, sent_counts, room.stream)
        return [room.stream.record_event(), received, sent]

    def _exchange(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
        beside: Any = None,
    ) -> None:
        into, out = _byte_parts(received, received_counts), _byte_parts(sent, sent_counts)
        into[self.index].copy_(out[self.index], non_blocking=True)
        largest = max(received_counts) * max(sent_counts) // sent_counts[self.index] * sent.itemsize
        mine = [
            (i, self.index - (self.index > i), into[i]) for i in self.others
        ]  # my place among the parts of each other
        self._swap([out[i] for i in self.others], mine, largest, beside)

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        shares = _byte_parts(whole, counts)
        self._swap([shares[self.index]], [(i, 0, shares[i]) for i in self.others], max(counts) * whole.itemsize)

    def broadcast(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            super().broadcast(tensor)
            return
        flat = _bytes(tensor)
        mine = self.index == 0
        self._swap([flat] if mine else [flat[:0]], [] if mine else [(0, 0, flat)], flat.numel())

    def pass_on(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Any:
        if not sent[0].is_cuda:
            return super().pass_on(received, sent)
        room, before = self._room(PASSING), (self.index - 1) % self.count
        if room.largest is None:  # parts differ by a row, and the first rank's are the longest
            longest = torch.tensor([sent[0].nbytes])
            super().broadcast(longest)
            room.largest = int(longest)
        room.stream = room.stream or torch.cuda.Stream(sent[0].device, priority=-1)
        with _on(room.stream, torch.cuda.current_stream()):
            for target, source in zip(received, sent, strict=True):
                room.swap([_bytes(source)], [(before, 0, _bytes(target))], room.largest, room.stream)
                self.exchanged.nbytes += source.nbytes
            return [room.stream.record_event(), *received, *sent]

    def wait(self, mark: Any) -> None:
        if mark and isinstance(mark[0], torch.cuda.Event):
            with self.exchanged.waiting(cuda=True):
                torch.cuda.current_stream().wait_event(mark[0])
            mark.clear()
        else:
            super().wait(mark)

    def _swap(
        self, out: Sequence[Tensor], into: Sequence[tuple[int, int, Tensor]], largest: int, beside: Any = None
    ) -> None:
        self._room(self.use).swap(out, into, largest, beside)
        self.exchanged.nbytes += sum(part.numel() for part in out)  # what others read of it twice was written once

    def open(self, device: torch.device) -> None:
        """Makes the room for its use, with all the others."""
        room = Room(self.ranks, self.index, device)
        room.prove()
        self.rooms[tuple(self.ranks), self.use] = room

    def _room(self, use: str) -> Room:
        return self.rooms[tuple(self.ranks), use]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)  # fails where it is not contiguous


def _byte_parts(flat: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    itemsize = flat.itemsize
    parts: Sequence[Tensor] = flat.view(torch.uint8).split_with_sizes([count * itemsize for count in counts])
    return parts

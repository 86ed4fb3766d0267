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
from wanvram.errors import DeviceError
from wanvram.sharing import BUFFER_BYTES, PASSING

__all__ = ["Room", "SymmetricPeers", "what_is_missing"]

MODULE = "torch.distributed._symmetric_memory"
_ALIGNED = 256


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
    return f"{MODULE} of this PyTorch has no {', '.join(absent)}" if absent else None


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
        self._handle = module.rendezvous(self._memory, group.group_name)
        self._buffers = [self._handle.get_buffer(n, (BUFFER_BYTES,), torch.uint8) for n in range(len(ranks))]
        self._index = index
        self._half = 0
        self.stream: Any = None  # of those who do not let the computation wait
        self.largest: int | None = None  # bytes that any of them ever passes on

    def swap(self, out: Sequence[Tensor], into: Sequence[tuple[int, int, Tensor]], largest: int) -> None:
        """Puts `out`, one for each place, where all can read it; copies (member, place, target) from there. Bytes, flat.

        largest: bytes of the largest part that any member puts down, the same number for all of them.
        """
        slot = BUFFER_BYTES // 2 // max(1, len(out)) // _ALIGNED * _ALIGNED
        for start in range(0, largest, slot):
            base = self._half * (BUFFER_BYTES // 2)
            for place, part in enumerate(out):
                _copy(self._buffers[self._index][base + place * slot :], part[start : start + slot])
            self._handle.barrier()
            for member, place, target in into:
                piece = target[start : start + slot]
                _copy(piece, self._buffers[member][base + place * slot :][: piece.numel()])
            self._half = 1 - self._half

    def prove(self) -> None:
        """Raises DeviceError where what another member put down is not what is read there; both halves, with all members."""
        device, others = self._buffers[0].device, [n for n in range(len(self._buffers)) if n != self._index]
        for _ in range(2):
            mine = torch.full((_ALIGNED,), 1 + self._index, dtype=torch.uint8, device=device)
            found = [torch.zeros_like(mine) for _ in others]
            self.swap([mine], [(n, 0, target) for n, target in zip(others, found, strict=True)], len(mine))
            if not all(bool((target == 1 + n).all()) for n, target in zip(others, found, strict=True)):
                raise DeviceError("copies between the GPUs brought other bytes than were sent; use --exchange_by nccl")


def _copy(target: Tensor, source: Tensor) -> None:
    if source.numel():
        target[: source.numel()].copy_(source, non_blocking=True)


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
        with self._beside(self._room(self.use), sent.device) as room:
            self._exchange(received, sent, received_counts, sent_counts)
            return [room.stream.record_event(), received, sent]

    @contextmanager
    def _beside(self, room: Room, device: torch.device) -> Iterator[Room]:
        """On the room's own stream, after what is computed by now: the computation goes on until it waits.

        Its barriers come before the blocks of an attention that waits to be computed, hence the priority.
        """
        room.stream = room.stream or torch.cuda.Stream(device, priority=-1)
        room.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(room.stream):
            yield room

    def _exchange(
        self, received: Tensor, sent: Tensor, received_counts: Sequence[int], sent_counts: Sequence[int]
    ) -> None:
        into, out = _byte_parts(received, received_counts), _byte_parts(sent, sent_counts)
        _copy(into[self.index], out[self.index])
        largest = max(map(len, into)) * max(map(len, out)) // len(out[self.index])
        mine = {i: self.index - (self.index > i) for i in self._others()}  # my place among the parts of each other
        self._swap([out[i] for i in self._others()], [(i, mine[i], into[i]) for i in self._others()], largest)

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        shares = _byte_parts(whole, counts)
        self._swap([shares[self.index]], [(i, 0, shares[i]) for i in self._others()], max(map(len, shares)))

    def broadcast(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            super().broadcast(tensor)
            return
        flat = _bytes(tensor)
        mine = self.index == 0
        self._swap([flat] if mine else [flat[:0]], [] if mine else [(0, 0, flat)], len(flat))

    def pass_on(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Any:
        if not sent[0].is_cuda:
            return super().pass_on(received, sent)
        room, before = self._room(PASSING), (self.index - 1) % self.count
        if room.largest is None:  # parts differ by a row, and the first rank's are the longest
            longest = torch.tensor([sent[0].nbytes])
            super().broadcast(longest)
            room.largest = int(longest)
        with self._beside(room, sent[0].device):
            for target, source in zip(received, sent, strict=True):
                room.swap([_bytes(source)], [(before, 0, _bytes(target))], room.largest)
                self.exchanged.nbytes += source.nbytes
            return [room.stream.record_event(), *received, *sent]

    def wait(self, mark: Any) -> None:
        if mark and isinstance(mark[0], torch.cuda.Event):
            with self.exchanged.waiting(cuda=True):
                torch.cuda.current_stream().wait_event(mark[0])
            mark.clear()
        else:
            super().wait(mark)

    def _swap(self, out: Sequence[Tensor], into: Sequence[tuple[int, int, Tensor]], largest: int) -> None:
        self._room(self.use).swap(out, into, largest)
        self.exchanged.nbytes += sum(map(len, out))  # what others read of it twice was written once

    def open(self, device: torch.device) -> None:
        """Makes the room for its use, with all the others."""
        room = Room(self.ranks, self.index, device)
        room.prove()
        self.rooms[tuple(self.ranks), self.use] = room

    def _room(self, use: str) -> Room:
        return self.rooms[tuple(self.ranks), use]


def _bytes(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def _byte_parts(tensor: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = _bytes(tensor).split([count * tensor.itemsize for count in counts])
    return parts

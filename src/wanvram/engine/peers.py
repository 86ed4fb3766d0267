"""Other ranks: what is sent to them and received from them. Device tensors travel in the computation's order, host tensors by gloo.

Everything is a grouped send and receive on the world's one communicator, so that NCCL connects only to those that are talked to
(docs/several-gpus.md). Every rank of an axis calls the same functions in the same order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from wanvram.errors import PeerLost
from wanvram.sharing import Place

__all__ = ["Exchanged", "Peers", "TorchPeers"]


@dataclass
class Exchanged:
    """What a rank has sent to others, bytes, and for how long its computation stood still for exchanges, seconds."""

    nbytes: int = 0
    seconds: float = 0.0
    _waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque, repr=False)

    @contextmanager
    def waiting(self, *, cuda: bool) -> Iterator[None]:
        """Around a wait: on CUDA of the computation's stream (what waits on another stands in nobody's way), else of this thread."""
        if not cuda:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start
            return
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._waits.append((before, after))
        if len(self._waits) > 1000:
            self.settle()

    def settle(self) -> Exchanged:
        """Counts the waits that are over. Nothing is waited for: a peer may be lost, and the device with it."""
        with suppress(RuntimeError):
            while self._waits and self._waits[0][1].query():
                before, after = self._waits.popleft()
                self.seconds += before.elapsed_time(after) / 1000
        return self


class Peers(Protocol):
    """The ranks of one axis, this one among them."""

    @property
    def index(self) -> int:
        """Mine among them."""

    @property
    def count(self) -> int: ...

    def exchange(
        self, received: Tensor, sent: Tensor, received_counts: Sequence[int], sent_counts: Sequence[int]
    ) -> Any:
        """Flat tensors, a part for each rank in order: what I send it, what it sends me. Starts it; returns a mark for `wait`."""

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        """Flat, a part for each rank in order. Mine is in its place; the others' arrive in theirs."""

    def broadcast(self, tensor: Tensor) -> None:
        """The first rank's values, contiguous, for all others."""

    def pass_on(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Any:
        """Starts sending to the next rank and receiving from the one before; returns a mark for `wait`."""

    def wait(self, mark: Any) -> None:
        """What was started is done for later computation. The mark keeps its tensors alive until then, and is used up."""

    def send(self, tensor: Tensor, index: int) -> Any:
        """Starts sending to one rank; returns a mark for `wait`."""

    def receive(self, tensor: Tensor, index: int) -> None: ...

    def told(self, value: Any) -> Any:
        """The first rank's plain data, for all."""

    def meet(self) -> None:
        """Returns when every rank has come here. Takes no device memory."""


@dataclass
class TorchPeers:
    """Over torch.distributed's default group, which run.launch has made: gloo for host tensors, NCCL for those of CUDA.

    group: another one of all ranks. PeerLost: a rank does not answer any more.
    """

    place: Place
    axis: str
    exchanged: Exchanged = field(default_factory=Exchanged)
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.ranks = self.place.members(self.axis)
        self.index = self.place.index(self.axis)
        self.count = len(self.ranks)
        self.others = [i for i in range(self.count) if i != self.index]

    def exchange(
        self, received: Tensor, sent: Tensor, received_counts: Sequence[int], sent_counts: Sequence[int]
    ) -> Any:
        into, out = received.split(list(received_counts)), sent.split(list(sent_counts))
        into[self.index].copy_(out[self.index])
        return self._started([(i, out[i]) for i in self.others], [(i, into[i]) for i in self.others])

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        shares = whole.split(list(counts))
        mine = shares[self.index]
        self._at_once([(i, mine) for i in self.others], [(i, shares[i]) for i in self.others])

    def broadcast(self, tensor: Tensor) -> None:
        if self.index == 0:
            self._at_once([(i, tensor) for i in self.others], [])
        else:
            self._at_once([], [(0, tensor)])

    def pass_on(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Any:
        after, before = (self.index + 1) % self.count, (self.index - 1) % self.count
        return self._started([(after, t) for t in sent], [(before, t) for t in received])

    def wait(self, mark: Any) -> None:
        if not mark:
            return
        with self.exchanged.waiting(cuda=mark[-1].is_cuda):
            try:
                while not isinstance(mark[0], Tensor):
                    mark.pop(0).wait()
            except RuntimeError as error:
                raise self._lost(error) from error
        mark.clear()

    def send(self, tensor: Tensor, index: int) -> Any:
        return self._started([(index, tensor)], [])

    def receive(self, tensor: Tensor, index: int) -> None:
        self._at_once([], [(index, tensor)])

    def told(self, value: Any) -> Any:
        told = [value]
        try:
            dist.broadcast_object_list(told, src=self.ranks[0], device=torch.device("cpu"))
        except RuntimeError as error:
            raise self._lost(error) from error
        return told[0]

    def meet(self) -> None:
        token = torch.zeros(1, dtype=torch.uint8)
        self._at_once([(i, token) for i in self.others], [(i, token.clone()) for i in self.others])

    def _at_once(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> None:
        self.wait(self._started(sends, receives))

    def _started(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> list[Any]:
        operations = [dist.P2POp(dist.isend, t, self.ranks[i], self.group) for i, t in sends if t.numel()]
        operations += [dist.P2POp(dist.irecv, t, self.ranks[i], self.group) for i, t in receives if t.numel()]
        self.exchanged.nbytes += sum(t.nbytes for _, t in sends)
        if not operations:
            return []
        try:
            # A Work may keep its tensors alive or not; the mark does.
            return [*dist.batch_isend_irecv(operations), *(t for _, t in (*sends, *receives))]
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> PeerLost:
        return PeerLost(f"rank {self.place.rank} cannot reach another GPU's process any more: {error}")

"""Other ranks of a run that is simulated for one of them: shapes are checked, bytes booked on the clock, nobody answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wanvram.sharing import Place
from wanvram.simulate.memory import SimulatedMemory

__all__ = ["SimulatedPeers"]

HOST_COPIES = 3  # gloo's, of host tensors through sockets on one host: an assumption


@dataclass
class SimulatedPeers:
    """engine.peers.Peers without anybody there. Raises AssertionError for parts that do not make up their tensor.

    A copy of its own part is a kernel of the computation; what travels is on the clock's link.
    """

    place: Place
    axis: str
    memory: SimulatedMemory

    def __post_init__(self) -> None:
        self.clock = self.memory.clock
        self.index = self.place.index(self.axis)
        self.count = self.place.count(self.axis)

    def exchange(
        self, received: Tensor, sent: Tensor, received_counts: Sequence[int], sent_counts: Sequence[int]
    ) -> Any:
        into, out = self._split(received, received_counts), self._split(sent, sent_counts)
        into[self.index].copy_(out[self.index])
        outward, inward = sent.nbytes - out[self.index].nbytes, received.nbytes - into[self.index].nbytes
        return [self.clock.start_exchange(max(outward, inward), self.count - 1), sent, received]

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        mine = self._split(whole, counts)[self.index].nbytes
        self._travel(mine * (self.count - 1), whole.nbytes - mine, self.count - 1)

    def broadcast(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous(), "a broadcast tensor is not contiguous"
        if self.index == 0:
            self._travel(tensor.nbytes * (self.count - 1), 0, self.count - 1)
        else:
            self._travel(0, tensor.nbytes, 1)

    def pass_on(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Any:
        out, into = (sum(t.nbytes for t in tensors) for tensors in (sent, received))
        return [self.clock.start_exchange(max(out, into), 1), *sent, *received]

    def wait(self, mark: Any) -> None:
        if not mark:
            return
        self.clock.wait_for_exchange(mark[0])
        mark.clear()

    def send(self, tensor: Tensor, index: int) -> Any:
        if self.memory.is_host(tensor):
            return [self.clock.mark(), tensor]  # beside everything else: whoever receives it takes the time
        return [self.clock.start_exchange(tensor.nbytes, 1), tensor]

    def receive(self, tensor: Tensor, index: int) -> None:
        if self.memory.is_host(tensor):
            self.clock.copy_on_host(HOST_COPIES * tensor.nbytes)
        else:
            self._travel(0, tensor.nbytes, 1)

    def told(self, value: Any) -> Any:
        return value

    def meet(self) -> None:
        """The others are as fast as this one."""

    def _split(self, flat: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        assert len(counts) == self.count, f"{len(counts)} parts for {self.count} ranks"
        assert sum(counts) == flat.numel(), f"parts {list(counts)} of {flat.numel()} numbers"
        parts: tuple[Tensor, ...] = flat.split(list(counts))
        return parts

    def _travel(self, out: int, into: int, messages: int) -> None:
        self.clock.wait_for_exchange(self.clock.start_exchange(max(out, into), messages))

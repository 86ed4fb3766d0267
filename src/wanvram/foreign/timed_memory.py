"""Memory that another stream may still use when it is freed (Tensor.record_stream): given back by the clock.

How far the host runs ahead of the device decides what is reserved. It runs until the driver's queue is full.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from wanvram.simulate.allocator import CachingAllocator
from wanvram.simulate.clock import Clock, Price
from wanvram.simulate.gpus import GPU
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.memory import SimulatedMemory

__all__ = ["TimedMemory"]

QUEUED_LAUNCHES = 1024  # kernels and events that CUDA takes from the host before it makes it wait


class TimedMemory(SimulatedMemory):
    """timed: whether the clock runs. Only a program that calls record_stream needs it."""

    def __init__(self, gpu: GPU, allocator: CachingAllocator, libraries: Libraries, clock: Clock) -> None:
        super().__init__(gpu, allocator, libraries, clock=clock)
        self.timed = False  # whether the clock is needed: only under record_stream
        self._recorded: set[int] = set()
        self._launched: deque[float] = deque()  # when each is done
        self._awaited: deque[tuple[float, int]] = deque()  # (when the computation has passed, block)

    def record_stream(self, tensor: torch.Tensor) -> None:
        """Its block is given back only when the computation has passed: by the clock, which runs from the first such call on."""
        self.timed = True
        handle = self._device.get(tensor.untyped_storage()._cdata)
        if handle is not None:
            self._recorded.add(handle)

    def _await(self, handle: int) -> None:
        """The free of a block that another stream may still use."""
        self._recorded.remove(handle)
        del self.live[handle]
        self.allocator.await_stream(handle)
        if self.observer is not None:
            self.observer.free(handle)
        self._awaited.append((self.clock.mark(), handle))
        self._queued()  # the event that tells when the stream has passed

    def launch(self, price: Price, args: Any, result: Any) -> None:
        """One operation by the clock."""
        self.clock.compute(price, args, result)
        self._queued()

    def _queued(self) -> None:
        """The host waits where as many launches and events as the driver's queue holds are not done."""
        self._launched.append(self.clock.mark())
        if len(self._launched) > QUEUED_LAUNCHES:
            self.clock.host_waits(self._launched.popleft())

    def _passed(self, now: float) -> None:
        """Gives back what was awaited until now, in seconds."""
        while self._awaited and self._awaited[0][0] <= now:
            self.allocator.free(self._awaited.popleft()[1])

    def synchronize(self) -> None:
        super().synchronize()
        self._passed(self.clock.now())

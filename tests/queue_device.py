"""A device whose computation and copies run late and in any order that their marks allow, as a GPU's streams may."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from wanvram.engine.devices import CpuDevice

QUEUES = COMPUTE, COPIES, RETURNS, GATHERS = "compute", "copies", "returns", "gathers"
LATE = (0.0, 0.0)  # nothing runs before somebody waits for it
AT_ONCE = (1.0, 1.0)


@dataclass(eq=False)
class Mark:
    queue: str
    position: int  # operations of that queue that must have run


class QueueDevice(CpuDevice):
    """Four queues as a GPU's streams: each runs in order, all together in any order that their marks allow.

    haste: how likely an operation of (computation, copies either way) runs at once when one more is queued; the rest runs when
    it is waited for.
    """

    def __init__(self, haste: tuple[float, float] = LATE, seed: int = 0) -> None:
        super().__init__()
        self.haste = dict(zip(QUEUES, (*haste, haste[1], haste[1]), strict=True))
        self.random = Random(seed)
        self.queues: dict[str, deque[tuple[tuple[Mark | None, ...], Callable[[], None]]]] = {q: deque() for q in QUEUES}
        self.queued = dict.fromkeys(QUEUES, 0)
        self.host_buffers: list[int] = []
        self.lock = threading.RLock()

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        self.host_buffers.append(shape[0])
        return super().host_empty(shape, dtype)

    def compute(self, operation: Callable[[], None]) -> None:
        self._queue(COMPUTE, (), operation)

    def prefetch(self, destination: Tensor, source: Tensor, *after: Any) -> Mark:
        return self._queue(COPIES, after, partial(destination.copy_, source))

    def write_back(self, destination: Tensor, source: Tensor, after: Any) -> Mark:
        return self._queue(RETURNS, (after,), partial(destination.copy_, source))

    def gather_beside(self, peers: Any, whole: Tensor, after: Any) -> Mark:
        return self._queue(GATHERS, (after,), peers.gathering(whole))

    def mark(self) -> Mark:
        return Mark(COMPUTE, self.queued[COMPUTE])

    def wait(self, mark: Mark | None) -> None:
        self._queue(COMPUTE, (mark,), lambda: None)

    def reader_waits(self, mark: Mark | None) -> None:
        with self.lock:
            while mark is not None and not self.passed(mark):
                self._run_one(mark.queue)

    def passed(self, mark: Mark) -> bool:
        return self.queued[mark.queue] - len(self.queues[mark.queue]) >= mark.position

    def finish(self) -> None:
        self.reader_waits(self.mark())
        for queue in (COPIES, RETURNS, GATHERS):
            self.reader_waits(Mark(queue, self.queued[queue]))

    def _queue(self, queue: str, after: tuple[Mark | None, ...], operation: Callable[[], None]) -> Mark:
        with self.lock:
            self.queues[queue].append((after, operation))
            self.queued[queue] += 1
            mark = Mark(queue, self.queued[queue])
            for name in self.random.sample(QUEUES, len(QUEUES)):
                while self.queues[name] and self.random.random() < self.haste[name]:
                    if not all(mark is None or self.passed(mark) for mark in self.queues[name][0][0]):
                        break
                    self._run_one(name)
            return mark

    def _run_one(self, queue: str) -> None:
        for mark in self.queues[queue][0][0]:
            self.reader_waits(mark)
        self.queues[queue].popleft()[1]()

"""Tensors between host and device by way of two pinned buffers each way, so that neither side stops for the other."""

from __future__ import annotations

from collections import deque
from math import prod
from typing import Any

import torch

from wanvram.engine.devices import Device

__all__ = ["Ferry"]


class _Buffer:
    """Pinned RAM that grows to the largest tensor it has carried. `mark`: when its last copy is done."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.mark: Any = None
        self._bytes = device.host_empty((0,), torch.uint8)

    def shaped(self, like: torch.Tensor) -> torch.Tensor:
        nbytes = prod(like.shape) * like.itemsize
        if self._bytes.nbytes < nbytes:
            self._bytes = self.device.host_empty((nbytes,), torch.uint8, pinned=True)
        return self._bytes[:nbytes].view(like.dtype).view(like.shape)


class Ferry:
    """What comes down lands in its target later: when two more have come down, or at `land`.

    A blocking download lets the GPU run dry after every tile of every frame group: 84 times in a decode of four tiles.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._down = deque(_Buffer(device) for _ in range(2))
        self._up = deque(_Buffer(device) for _ in range(2))
        self._landing: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()

    def down(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Starts copying a device tensor; `target`, a host tensor or a view of one, has it after `land`."""
        self.land(leave=1)
        buffer = self._turn(self._down)
        passage = buffer.shaped(tensor)
        buffer.mark = self.device.receive(passage, tensor)
        self._landing.append((target, passage, buffer.mark))

    def land(self, leave: int = 0) -> None:
        """Waits for what came down, but for the last `leave` tensors, and puts it into its targets."""
        while len(self._landing) > leave:
            target, passage, mark = self._landing.popleft()
            self.device.host_waits(mark)
            self.device.copy_on_host(target, passage)

    def park(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor for a device tensor's values; they are there once something is fetched."""
        target = self.device.host_empty(tuple(tensor.shape), tensor.dtype)
        self.down(tensor, target)
        return target

    def fetch(self, part: torch.Tensor) -> torch.Tensor:
        """A contiguous device tensor with the values of a parked one or of a view of it."""
        self.land()
        buffer = self._turn(self._up)
        self.device.host_waits(buffer.mark)
        result = self.device.send(part, buffer.shaped(part))
        buffer.mark = self.device.mark()
        return result

    def marks(self) -> list[Any]:
        """Those that are waited for later, as many each time."""
        landing = [mark for _, _, mark in self._landing]
        return [*(buffer.mark for buffer in (*self._down, *self._up)), *landing, *[None] * (2 - len(landing))]

    def skip(self, seconds: float) -> None:
        """A simulation goes on so much later: marks that are waited for are as much later."""
        for buffer in (*self._down, *self._up):
            buffer.mark = buffer.mark and self.device.later(buffer.mark, seconds)
        later = self.device.later
        self._landing = deque((target, passage, later(mark, seconds)) for target, passage, mark in self._landing)

    @staticmethod
    def _turn(buffers: deque[_Buffer]) -> _Buffer:
        buffers.rotate(1)
        return buffers[0]

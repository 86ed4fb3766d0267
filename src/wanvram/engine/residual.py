"""The residual stream in pinned RAM: its row chunks come and go beside the computation, through slots that are allocated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from wanvram.engine.devices import Device
from wanvram.errors import DeviceError
from wanvram.knobs import RESIDUAL_IN
from wanvram.models.dit_blocks import chunks
from wanvram.units import human

__all__ = ["PinnedRows"]

SLOTS = 3  # one computes, one is being filled, one is on its way back: hidden where a copy takes no longer than a chunk's work


class PinnedRows:
    """A stream float32 [length, dim] that `rows` takes through the device again and again (models.dit_regrouped.RowStream).

    Passes have one order, so that the first chunks of the next are on their way while the last of this one compute. `between`
    is told after every chunk how many there are: what else has to be copied may follow it.
    """

    def __init__(
        self, device: Device, length: int, dim: int, rows: int | None, between: Callable[[int], None] = lambda _: None
    ) -> None:
        """Raises DeviceError where RAM cannot hold it."""
        needed, room = length * dim * torch.float32.itemsize, device.host_room()
        if room is not None and needed > room:
            raise DeviceError(
                f"the residual stream needs {human(needed)} of RAM and {human(room)} are available; "
                f"use {RESIDUAL_IN.asked('device')}"
            )
        self.device, self.between = device, between
        self._chunks = list(chunks(length, rows))
        self._host = device.host_empty((length, dim), torch.float32, pinned=True)
        most = self._chunks[0].stop
        self._slots = [device.empty((most, dim), torch.float32) for _ in range(min(SLOTS, len(self._chunks)))]
        self._free: list[Any] = [None] * len(self._slots)  # marks after which a slot may be overwritten
        self._written: list[Any] = [None] * len(self._chunks)  # marks after which a chunk is in RAM
        self._coming: dict[int, Any] = {}  # visits of chunks, counted over all passes, and when they are there
        self._visits = 0

    def rows(self, *, reads: bool = True, writes: bool = True) -> Iterator[tuple[slice, torch.Tensor]]:
        """Every pass is gone through to its end, and one that writes is followed by one that reads."""
        for index, chunk in enumerate(self._chunks):
            visit, slot = self._visits, self._visits % len(self._slots)
            if reads and visit not in self._coming:
                self._read(visit)
            self.device.wait(self._coming.pop(visit) if reads else self._free[slot])
            x = self._rows(visit)
            yield chunk, x
            self._free[slot] = self.device.mark()
            if writes:
                self._free[slot] = self.device.write_back(self._host[chunk], x, self._free[slot])
                self._written[index] = self._free[slot]
            self._visits += 1
            self.between(len(self._chunks))  # before the next read, which waits for what has just begun to be written
            ahead = index + len(self._slots)
            if reads if ahead < len(self._chunks) else writes:
                self._read(visit + len(self._slots))

    def _rows(self, visit: int) -> torch.Tensor:
        chunk = self._chunks[visit % len(self._chunks)]
        return self._slots[visit % len(self._slots)][: chunk.stop - chunk.start]

    def _read(self, visit: int) -> None:
        index = visit % len(self._chunks)
        after = self._free[visit % len(self._slots)], self._written[index]
        self._coming[visit] = self.device.prefetch(self._rows(visit), self._host[self._chunks[index]], *after)

    def close(self) -> None:
        """Copies under way end before their memory is given back."""
        for mark in (*self._free, *self._coming.values()):
            self.device.reader_waits(mark)
        self._coming.clear()
        self._slots.clear()
        del self._host

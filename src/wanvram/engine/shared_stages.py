"""Who of several ranks does which stage, and what it hands to the others.

The first rank reads prompts and pictures, encodes them and draws the noise (a CUDA generator depends on the card); the others receive
them, and never load what encoded them. All denoise. Tiles of the decoder are shared; the first rank gets their frames and writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from wanvram.engine.devices import Device
from wanvram.sharing import CFG, WORLD

__all__ = ["SharedStages"]

T = TypeVar("T")


class SharedStages:
    """For the rank of a device. Alone, everything is made here and nothing is sent."""

    def __init__(self, device: Device) -> None:
        self.device, self.place = device, device.place
        self.world, self._cfg = device.peers(WORLD), device.peers(CFG)

    @property
    def is_alone(self) -> bool:
        return self.place.world == 1

    @property
    def is_first(self) -> bool:
        return self.place.rank == 0

    def told(self, value: T) -> T:
        """The first rank's plain data."""
        told: T = value if self.is_alone else self.world.told(value)
        return told

    def handed(
        self, make: Callable[[], list[torch.Tensor]], like: Callable[[], list[torch.Tensor]], *, everyone: bool = False
    ) -> list[torch.Tensor]:
        """What the first rank makes, on the device of every rank. like: uninitialised tensors of the same shapes and types.

        everyone: all of them make it.
        """
        if self.is_alone or everyone:
            return make()
        tensors = make() if self.is_first else like()
        for tensor in tensors:
            self.world.broadcast(tensor)
        return tensors

    def my_guidance(self, groups: list[T]) -> list[T]:
        """Of the passes with and without the prompt, those that this rank makes."""
        return groups if self.place.cfg == 1 else [groups[self.place.index(CFG)]]

    def with_theirs(self, mine: list[torch.Tensor]) -> list[torch.Tensor]:
        """The velocities of both guidance passes, those with the prompt first, where this rank made one of them."""
        if self.place.cfg == 1:
            return mine
        theirs = [torch.empty_like(velocity) for velocity in mine]
        self._cfg.wait(self._cfg.pass_on(theirs, mine))
        return mine + theirs if self._cfg.index == 0 else theirs + mine

    def my_tiles(self, tiles: int) -> list[int]:
        """Numbers of those that this rank decodes, of so many."""
        return list(range(self.place.rank, tiles, self.place.world))

    def decodes(self, tiles: int | None) -> bool:
        """Whether this rank decodes at all; None: whole frames, which are not shared."""
        return self.is_first if tiles is None else self.place.rank < tiles

    def others_tiles(self, number: int, tiles: int) -> Iterator[tuple[int, int]]:
        """(rank, tile) of the other ranks in the round of the first rank's tile `number`."""
        return ((rank, number + rank) for rank in range(1, self.place.world) if number + rank < tiles)

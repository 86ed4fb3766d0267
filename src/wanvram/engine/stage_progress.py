"""What a stage says of itself while it works: how many of its steps, frames, tiles or blocks are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Count", "Done", "Tell", "counted", "counted_walk"]


@dataclass(frozen=True)
class Done:
    """`number` of `total` units are done and `left` are to be run: fewer than the difference where some are only simulated."""

    stage: str
    number: int
    total: int
    unit: str
    left: int


Tell = Callable[[Done], None]
Item = TypeVar("Item")


@dataclass
class Count:
    """Counts one stage's units; tells nobody if there is nobody."""

    tell: Tell | None
    stage: str
    total: int
    unit: str
    number: int = 0

    def add(self, units: int = 1) -> None:
        """That many more are done."""
        self.number += units
        if self.tell is not None:
            self.tell(Done(self.stage, self.number, self.total, self.unit, self.total - self.number))


def counted(items: Iterable[Item], count: Count, size: Callable[[Item], int]) -> Iterator[Item]:
    """The items; each counts as done, `size` units of it, when the next is asked for. Holds none while it is worked on."""
    held: list[Item] = []
    for _ in map(held.append, items):
        units = size(held[0])
        yield held.pop()
        count.add(units)


def counted_walk(walk: Callable[..., Iterator[Item]], tell: Tell | None, stage: str) -> Callable[..., Iterator[Item]]:
    """The walk over a model's blocks; each is done when the next is asked for."""
    return lambda units: counted(walk(units), Count(tell, stage, len(units), "blocks"), lambda _: 1)

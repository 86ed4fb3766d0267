"""Blocks that a simulation leaves out because those before them show what they would do: each left all as the one before it.

A block's allocations follow from what it finds: free blocks of the allocator, live ones, and its sizes. Where these are the same
after several blocks of the same sizes, and every timeline of the clock moved by as much for each, so they will be after the next:
if none overtakes another. A host that was behind the computation and comes nearer would be waited for only after some blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from operator import sub
from typing import Any, Protocol

__all__ = ["Repeats", "Standing"]

PERIOD = 2  # groups that are compared: the three units of a block take turns with two slots
KEPT = 2  # groups that are walked at the end, while the slots are filled for the next pass
_SAME_SECONDS = 1e-9  # of two periods, relative: sums of floats that were added in another order


@dataclass(frozen=True)
class Standing:
    """Where a simulated device stands: what the next work depends on, and the moments and sums that grow with it.

    timelines: the computation's first, then the host's. marks: moments that are waited for later.
    """

    state: Hashable
    timelines: tuple[float, ...]
    sums: tuple[float, ...]
    marks: tuple[float, ...] = ()

    def since(self, earlier: Standing) -> Standing:
        """The differences."""
        pairs = [(getattr(self, name), getattr(earlier, name)) for name in ("timelines", "sums", "marks")]
        return Standing(self.state, *(tuple(map(sub, now, then)) for now, then in pairs))

    def lasts(self, before: Standing) -> bool:
        """Differences as those before them, and no timeline overtakes another: what is used moves as the computation does, or is the
        host and falls behind it."""
        mine, theirs = (c.timelines + c.sums + c.marks for c in (self, before))
        computation, host, *others = self.timelines
        return (
            all(map(_is_same, mine, theirs))
            and (host < computation or _is_same(host, computation))
            and all(moved == 0 or _is_same(moved, computation) for moved in (*others, *self.marks))
        )


class _Standable(Protocol):
    def standing(self) -> Standing | None: ...
    def stand_for(self, times: int, timelines: Sequence[float], sums: Sequence[float]) -> float: ...


class Repeats:
    """Of one walk. groups: what each consists of, equal where they do the same."""

    def __init__(self, device: _Standable, groups: Sequence[Any]) -> None:
        self.device, self.groups = device, groups
        self._before: list[Standing] = []

    def leave_out(self, index: int, streamed: Callable[[int], int], marks: Sequence[float] = ()) -> tuple[int, float]:
        """Before group `index`, and called before each: how many are left out, and the seconds that these took, which are booked.

        streamed: of a group, the pieces that come through the two slots: as many must come through each. marks: of the slots.
        """
        standing, times = self.device.standing(), self._periods_alike(index)
        if standing is None:
            return 0, 0.0
        self._before.append(replace(standing, marks=tuple(marks)))
        odd = sum(map(streamed, range(index - PERIOD, index))) % 2 if times else 0
        if times < 1 or odd or len(self._before) <= 2 * PERIOD:
            return 0, 0.0
        first, second, now = self._before[-1 - 2 * PERIOD], self._before[-1 - PERIOD], self._before[-1]
        change = now.since(second)
        alike = first.state == second.state == now.state
        if not (alike and change.lasts(second.since(first))):
            return 0, 0.0
        self._before.clear()
        return times * PERIOD, self.device.stand_for(times, change.timelines, change.sums)

    def _periods_alike(self, index: int) -> int:
        """Periods from here that are as the two before were, without those that are walked in any case."""
        start = index - 2 * PERIOD
        if start < 0:
            return 0
        end = index
        while end < len(self.groups) and self.groups[end] == self.groups[start + (end - start) % PERIOD]:
            end += 1
        past = all(self.groups[n] == self.groups[n - PERIOD] for n in range(start + PERIOD, index))
        return (end - index - KEPT) // PERIOD if past else 0


def _is_same(change: float, before: float) -> bool:
    return math.isclose(change, before, rel_tol=_SAME_SECONDS, abs_tol=1e-12)

"""Blocks that a simulation leaves out because those before them show what they would do: each left all as the one before it.

A block's allocations follow from what it finds: free blocks of the allocator, live ones, and its sizes. Where these are the same
after several blocks of the same sizes, and every timeline of the clock moved by as much for each, so they will be after the next:
if none overtakes another. A host that was behind the computation and comes nearer would be waited for only after some blocks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from operator import sub
from typing import Any, Protocol

__all__ = ["Repeats", "Standing"]

LAST_GROUPS, LAST_PIECES = (
    2,
    4,
)  # walked at least, where pieces come through two slots: two are on their way, two follow them
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
        # Marks are not compared with those before: one group on, the slots have changed places.
        mine, theirs = (change.timelines + change.sums for change in (self, before))
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
    """Of one walk. groups: what each consists of, equal where they do the same. periods: after how many groups the device may stand
    as before, shortest first. pieces: of each group, those that come through two slots, as many through each; while the last
    pieces are used, the slots are filled for the next pass, so that these are walked.
    """

    def __init__(
        self, device: _Standable, groups: Sequence[Any], periods: Sequence[int], pieces: Sequence[int] = ()
    ) -> None:
        self.device, self.groups, self.periods, self.pieces = device, groups, periods, pieces
        self.kept = 1
        while self.kept < len(pieces) and (
            self.kept < LAST_GROUPS or (any(pieces) and sum(pieces[-self.kept :]) < LAST_PIECES)
        ):
            self.kept += 1
        self._before: list[Standing] = []

    def leave_out(self, index: int, marks: Sequence[float | None] = ()) -> tuple[int, float]:
        """Before group `index`, and called before each: how many are left out, and the seconds that these took, which are booked.

        marks: what is waited for later, as many each time; None: nothing was there yet.
        """
        standing = self.device.standing()
        if standing is None:
            return 0, 0.0
        self._before.append(replace(standing, marks=tuple(mark or 0.0 for mark in marks)))
        for period in self.periods:
            times = self._periods_alike(index, period)
            if times < 1 or sum(self.pieces[index - period : index]) % 2:
                continue
            change = self._before[-1].since(self._before[-1 - period])
            earlier = self._before[-2].since(self._before[-2 - period])
            if standing.state == self._before[-1 - period].state and change.lasts(earlier):
                self._before.clear()
                return times * period, self.device.stand_for(times, change.timelines, change.sums)
        return 0, 0.0

    def _periods_alike(self, index: int, period: int) -> int:
        """Periods from here that are as the one before was, and as one that began a group earlier."""
        if len(self._before) < period + 2 or self.groups[index - 1] != self.groups[index - 1 - period]:
            return 0
        end = index
        while end < len(self.groups) and self.groups[end] == self.groups[end - period]:
            end += 1
        return (end - index - self.kept) // period


def _is_same(change: float, before: float) -> bool:
    return math.isclose(change, before, rel_tol=_SAME_SECONDS, abs_tol=1e-12)

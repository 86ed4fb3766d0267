"""Allocated and reserved memory over time in at most 4,000 points, whatever the number of events. No torch."""

from __future__ import annotations

from operator import itemgetter

__all__ = ["Point", "Points"]

MAX_BUCKETS = 1332  # of up to three points each

Point = tuple[float, int, int]  # seconds, allocated bytes, reserved bytes
_ALLOCATED, _RESERVED = itemgetter(1), itemgetter(2)


class Points:
    """A curve in at most 4,000 points: of every stretch its lowest, its highest and the highest reserved."""

    def __init__(self) -> None:
        self._buckets: list[tuple[Point, Point, Point]] = []
        self._stride = 1
        self._begin()

    def _begin(self) -> None:
        self._count = 0
        self._low: Point = (0.0, 1 << 80, 0)
        self._high: Point = (0.0, -1 << 80, 0)
        self._held: Point = (0.0, 0, -1 << 80)

    def add(self, x: float, allocated: int, reserved: int) -> None:
        if allocated < self._low[1]:
            self._low = (x, allocated, reserved)
        if allocated > self._high[1]:
            self._high = (x, allocated, reserved)
        if reserved > self._held[2]:
            self._held = (x, allocated, reserved)
        self._count += 1
        if self._count >= self._stride:
            self._close()

    def result(self) -> list[Point]:
        if self._count:
            self._close()
        result: list[Point] = []
        for bucket in self._buckets:
            result.extend(sorted(set(bucket)))
        return result

    def _close(self) -> None:
        self._buckets.append((self._low, self._high, self._held))
        self._begin()
        if len(self._buckets) > MAX_BUCKETS:
            pairs = [self._buckets[i : i + 2] for i in range(0, len(self._buckets), 2)]
            self._buckets = [
                (min(low, key=_ALLOCATED), max(high, key=_ALLOCATED), max(held, key=_RESERVED))
                for low, high, held in (zip(*pair, strict=True) for pair in pairs)
            ]
            self._stride *= 2

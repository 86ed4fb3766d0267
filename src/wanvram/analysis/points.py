"""Allocated and reserved memory over time in at most 4,000 points, whatever the number of events. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

__all__ = ["Point", "Points"]

MAX_BUCKETS = 1332  # of up to three points each

Point = tuple[float, int, int]  # seconds, allocated bytes, reserved bytes
_ALLOCATED, _RESERVED = itemgetter(1), itemgetter(2)


class Points:
    """A curve in at most 4,000 points: of every stretch its lowest, its highest and the highest reserved."""

    def __init__(self) -> None:
        self._buckets: list[tuple[Point, Point, Point]] = []
        self._open: list[Point] = []
        self._stride = 1

    def add(self, point: Point) -> None:
        self._open.append(point)
        if len(self._open) >= self._stride:
            self._close()

    def result(self) -> list[Point]:
        if self._open:
            self._close()
        return [point for bucket in self._buckets for point in sorted(set(bucket))]

    def _close(self) -> None:
        self._buckets.append(_extremes(self._open, self._open, self._open))
        self._open = []
        if len(self._buckets) > MAX_BUCKETS:
            pairs = [self._buckets[i : i + 2] for i in range(0, len(self._buckets), 2)]
            self._buckets = [_extremes(*zip(*pair, strict=True)) for pair in pairs]
            self._stride *= 2


def _extremes(low: Iterable[Point], high: Iterable[Point], held: Iterable[Point]) -> tuple[Point, Point, Point]:
    return min(low, key=_ALLOCATED), max(high, key=_ALLOCATED), max(held, key=_RESERVED)

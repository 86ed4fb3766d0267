"""How far a stage is and how long it will take, as sentences for the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

from wanvram.engine.stage_progress import Done
from wanvram.units import seconds

__all__ = ["StageProgress"]

LEAST_SECONDS = 2.0  # between two sentences, so that a log of hours stays readable


class StageProgress:
    """`decode: 12 of 81 frames, 21.4 s left`: at most every two seconds, and at the end of a stage.

    What is left is told from the second report of a stage on: the first unit of work also starts libraries. A simulation
    takes other seconds than those it predicts, so there only its own end is told.
    """

    def __init__(self, show: Callable[[str], None], *, simulated: bool) -> None:
        self._show = show
        self._simulated = simulated
        self._stage = ""
        self._began = self._told = time.monotonic()
        self._left_at_first = 0

    def __call__(self, done: Done) -> None:
        now = time.monotonic()
        if done.stage != self._stage:
            self._stage, self._began, self._left_at_first = done.stage, now, done.left
        if done.left and now - self._told < LEAST_SECONDS:
            return
        self._told = now
        self._show(self._sentence(done, now - self._began))

    def _sentence(self, done: Done, elapsed: float) -> str:
        text = f"{done.stage}: {done.number} of {done.total} {done.unit}"
        worked = self._left_at_first - done.left
        if self._simulated:
            text += " simulated"
        elif worked:
            text += f", {seconds(elapsed / worked)} each"
        if worked and done.left:
            left = seconds(elapsed / worked * done.left)
            text += f"; the simulation has {left} left" if self._simulated else f", {left} left"
        return text

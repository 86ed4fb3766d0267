"""How far a stage is and how long it will take, told at a pace that can be read."""

from __future__ import annotations

import time

from wanvram.engine.stage_progress import Done
from wanvram.run_events import StageAdvanced, TellRun

__all__ = ["StageProgress"]

LEAST_SECONDS = 2.0  # between two events, so that a log of hours stays readable


class StageProgress:
    """What the stages say of themselves as events of the run: at most every two seconds, and at the end of a stage.

    What is left is told from the second report of a stage on: the first unit of work also starts libraries. A simulation
    takes other seconds than those it predicts, so there only its own end is told.
    """

    def __init__(self, tell: TellRun, *, simulated: bool) -> None:
        self._tell = tell
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
        worked = self._left_at_first - done.left
        each = (now - self._began) / worked if worked else None
        left = each * done.left if each is not None and done.left else None
        self._tell(StageAdvanced(done.stage, done.number, done.total, done.unit, each, left, self._simulated))

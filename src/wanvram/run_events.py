"""What a run tells of itself while it goes on, as values: whoever shows them makes the sentences. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["RunEvent", "StageAdvanced", "StageBegan", "StageEnded", "TellRun"]


@dataclass(frozen=True)
class StageBegan:
    """A load or a stage begins."""

    stage: str


@dataclass(frozen=True)
class StageEnded:
    """A stage, not a load, has ended."""

    stage: str
    peak_allocated_bytes: int


@dataclass(frozen=True)
class StageAdvanced:
    """`done` of `total` units. seconds_each, seconds_left: None while nothing is known of them; simulated: of the simulation's own time."""

    stage: str
    done: int
    total: int
    unit: str
    seconds_each: float | None = None
    seconds_left: float | None = None
    simulated: bool = False


RunEvent = StageBegan | StageEnded | StageAdvanced
TellRun = Callable[[RunEvent], None]

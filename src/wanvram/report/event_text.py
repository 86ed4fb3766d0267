"""What a run tells while it goes on, in a sentence each. No torch."""

from __future__ import annotations

from wanvram.run_events import RunEvent, StageAdvanced, StageBegan
from wanvram.units import human, seconds

__all__ = ["event_text"]


def event_text(event: RunEvent) -> str:
    """`decode: 12 of 81 frames, 0.50 s each, 34.5 s left`."""
    if isinstance(event, StageBegan):
        return event.stage
    if isinstance(event, StageAdvanced):
        return _advanced(event)
    return f"{event.stage} done, peak {human(event.peak_allocated_bytes)} allocated"


def _advanced(event: StageAdvanced) -> str:
    text = f"{event.stage}: {event.done} of {event.total} {event.unit}"
    left = None if event.seconds_left is None else f"{seconds(event.seconds_left)} left"
    if event.simulated:
        return f"{text} simulated" + (f"; the simulation has {left}" if left else "")
    if event.seconds_each is not None:
        text += f", {seconds(event.seconds_each)} each"
    return f"{text}, {left}" if left else text

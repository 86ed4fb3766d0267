"""What is said of denoising while it goes on: a run says its own speed, a simulation only how far the simulation is."""

from __future__ import annotations

import pytest

from wanvram.run import execute
from wanvram.run.execute import StepProgress


def lines(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, int, int]], *, simulated: bool) -> list[str]:
    """Of steps that take 3 seconds each."""
    said: list[str] = []
    clock = iter(range(0, 300, 3))
    monkeypatch.setattr(execute.time, "monotonic", lambda: float(next(clock)))
    progress = StepProgress(said.append, simulated)
    for call in calls:
        progress(*call)
    return said


def test_a_run_says_its_steps_and_the_seconds_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, [(1, 4, 3), (2, 4, 2), (3, 4, 1), (4, 4, 0)], simulated=False)
    assert said[0] == "step 2 of 4 done, 3.00 s each, 6 s left"
    assert said[-1] == "step 4 of 4 done, 3.00 s each, 0 s left"


def test_progress_of_a_simulation_does_not_look_like_the_speed_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, [(1, 50, 3), (2, 50, 2), (3, 50, 1), (50, 50, 0)], simulated=True)
    assert said[0] == "2 of 4 steps simulated, 6 s of the simulation left"
    assert said[-1] == "4 of 4 steps simulated, 0 s of the simulation left"
    assert not any("each" in line for line in said)

"""Blocks that a simulation leaves out change nothing of what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
from torch import nn

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.engine.repeats import Repeats, Standing
from wanvram.engine.residency import Component
from wanvram.predict.simulate import simulate

STRATEGIES: dict[str, dict[str, Any]] = {
    "pinned": {},
    "whole weights": {"load_strategy": "full", "offload": False, "cfg": "joint"},
    "disk": {"weights_in": "disk", "weight_storage": "fp8"},
    "every second block on the device": {"resident_blocks": 15, "weights_in": "pageable"},
    "shares over a bus": {"ulysses_size": 2, "dit_fsdp": True},
    # The computation waits for a block from disk, and a host that is slower than it comes up again 3 to 9 blocks later.
    "a host that catches up": {"resident_blocks": 28, "weights_in": "disk", "cfg": "joint", "precision": "fp16"},
    "rows in RAM beside whole weights": {"load_strategy": "full", "residual_in": "pinned"},
}


def config(task: str = "t2v-1.3B", link: str | None = None, **chosen: Any) -> RunConfig:
    request = Request.for_task(task, size="832*480", frame_num=5, sample_steps=6, prompt="a cat", base_seed=3)
    how = Strategy(**{"load_strategy": "block", "offload": True, **chosen})
    few = Measurement(profile_memory=False)
    return RunConfig("x", "", "simulated", request, how, few, "random", gpu="h200", link=link)


def said(run: RunConfig) -> dict[str, Any]:
    record, _ = simulate(run)
    assert record.failure is None
    return asdict(record)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield path, value
        return
    for key, part in items:
        yield from flat(part, f"{path}.{key}")


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units that were visited, walk by walk."""
    counts: list[int] = []
    for name in ("walk", "walk_alike"):
        original = getattr(Component, name)

        def counted(self: Component, units: Sequence[nn.Module], original: Any = original) -> Iterator[nn.Module]:
            counts.append(0)
            for unit in original(self, units):
                counts[-1] += 1
                yield unit

        monkeypatch.setattr(Component, name, counted)
    return counts


def assert_same(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether something is left out or not."""
    short = dict(flat(said(run)))
    monkeypatch.setattr(Repeats, "leave_out", lambda *_, **__: (0, 0.0))
    whole = dict(flat(said(run)))
    assert short.keys() == whole.keys()
    for path, value in whole.items():
        if isinstance(value, float) and "timestamp" not in path:
            assert short[path] == pytest.approx(value, rel=1e-9, abs=1e-9), path
        elif not isinstance(value, float):
            assert short[path] == value, path


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_record_is_the_same_whether_blocks_are_left_out_or_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(link="pcie4" if "bus" in name else None, **STRATEGIES[name])
    if "host" in name:
        run = replace(run, gpu="rtx4090", request=replace(run.request, frame_num=9, sample_guide_scale=1.0))
    assert_same(run, monkeypatch)


def test_a_record_with_blocks_of_two_kinds_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(config("vace-1.3B"), monkeypatch)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_record_is_the_same_whether_frames_of_tiles_are_left_out_or_not(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(vae_tile=40, ulysses_size=ranks)
    assert_same(replace(run, request=replace(run.request, frame_num=49, sample_steps=1)), monkeypatch)


def test_most_blocks_of_a_pass_are_left_out(walked: list[int]) -> None:
    simulate(config())
    passes = walked[-8:]  # of four steps, 30 blocks of three units each
    assert max(passes) <= 30


def test_a_step_that_is_recorded_block_by_block_leaves_none_out() -> None:
    record, _ = simulate(replace(config(), measurement=Measurement(log_interval=1)))
    (denoise,) = [stage for stage in record.stages if stage.part == "denoise"]
    blocks = [block for block in denoise.children[0].children if block.kind == "block"]
    assert sum(block.repeats for block in blocks) == 60


class Steady:
    """A device that is as far on after every group, until it is asked for the `odd` one; others: what its timelines take of a group."""

    def __init__(self, odd: int | None = None, others: Sequence[float] = (0.5, 1.0, 0.0)) -> None:
        self.asked, self.odd, self.booked = 0, odd, list[tuple[int, tuple[float, ...]]]()
        self.others = others

    def standing(self) -> Standing:
        self.asked += 1
        timelines = [float(self.asked), *(5.0 + self.asked * each for each in self.others)]
        return Standing("odd" if self.asked == self.odd else "same", tuple(timelines), (5.0,))

    def stand_for(self, times: int, timelines: Sequence[float], sums: Sequence[float]) -> float:
        self.booked.append((times, (*timelines, *sums)))
        return times * timelines[0]


def left_out(device: Any, groups: Sequence[object], streamed: int = 3) -> tuple[int, int, float]:
    """The first group that is left out, how many are, and the seconds; (0, 0, 0.0): none is."""
    repeats = Repeats(device, groups, (1, 2, 3), [streamed] * len(groups))
    for index in range(len(groups)):
        count, seconds = repeats.leave_out(index)
        if count:
            return index, count, seconds
    return 0, 0, 0.0


def test_what_a_period_did_twice_is_left_out_up_to_the_last_groups() -> None:
    device = Steady()
    assert left_out(device, ["block"] * 20, streamed=2) == (2, 16, 16.0)
    assert device.booked == [(16, (1.0, 0.5, 1.0, 0.0, 0.0))]


def test_as_many_pieces_go_through_each_of_the_two_slots() -> None:
    assert left_out(Steady(), ["block"] * 20, streamed=3) == (3, 14, 14.0)


def test_groups_that_take_turns_are_left_out_in_pairs() -> None:
    assert left_out(Steady(), ["block", "other"] * 10) == (3, 14, 14.0)


@pytest.mark.parametrize("groups", [["block"] * 5, ["a", "b", "c", "d", "e"] * 4, list(range(20))])
def test_nothing_is_left_out_where_groups_differ_or_are_few(groups: list[object]) -> None:
    assert left_out(Steady(), groups) == (0, 0, 0.0)


def test_a_state_that_comes_once_is_waited_out() -> None:
    assert left_out(Steady(odd=3), ["block"] * 20, streamed=2) == (3, 14, 14.0)


class Accelerating(Steady):
    def standing(self) -> Standing:
        self.asked += 1
        return Standing("same", (float(self.asked**2), 0.0), ())


def test_nothing_is_left_out_while_times_change() -> None:
    assert left_out(Accelerating(), ["block"] * 20) == (0, 0, 0.0)


@pytest.mark.parametrize("others", [(1.1, 1.0), (0.5, 0.9), (0.5, 1.1)])
def test_nothing_is_left_out_where_one_timeline_would_overtake_another(others: tuple[float, ...]) -> None:
    assert left_out(Steady(others=others), ["block"] * 20) == (0, 0, 0.0)


@pytest.mark.parametrize(("step", "first"), [(1.0, 2), (0.0, 2), (0.9, 0)])
def test_what_a_slot_waits_for_moves_as_the_computation_does_or_not_at_all(step: float, first: int) -> None:
    repeats = Repeats(Steady(), ["block"] * 20, (1, 2, 3), [2] * 20)
    assert next((n for n in range(20) if repeats.leave_out(n, (3.0 + step * n,))[0]), 0) == first

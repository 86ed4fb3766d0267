"""The planner's promise on budgets, tasks and cards at random: never above the budget, never slower with more of it."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner_card import Card
from wanvram.config import Request, RunConfig
from wanvram.planner.budget import Budget
from wanvram.planner.placement import TIE
from wanvram.planner.result import Plan, Refusal
from wanvram.planner.search import Options, search
from wanvram.planner.transformer import NEGLIGIBLE
from wanvram.units import GIB

TASKS = st.sampled_from(
    [("t2v-1.3B", "832*480"), ("t2v-14B", "1280*720"), ("i2v-14B", "832*480"), ("vace-14B", "1280*720")]
)
CARDS = st.builds(Card, copy_rate=st.sampled_from([5e9, 12e9, 55e9]), flops=st.sampled_from([20e12, 100e12, 500e12]))


def request(task: str = "t2v-14B", size: str = "1280*720", **given: object) -> Request:
    return Request.for_task(task, size=size, **given)


def budget(gibibytes: float, ram: float | None = None, gpu: str = "h200") -> Budget:
    return Budget(int(gibibytes * GIB), ram_bytes=None if ram is None else int(ram * GIB), gpu=gpu)


@settings(max_examples=200)
@given(asked=TASKS, gibibytes=st.floats(3, 40), ram=st.floats(9, 128), card=CARDS)
def test_a_plan_is_within_one_per_cent_of_every_faster_one_that_it_names(
    asked: tuple[str, str], gibibytes: float, ram: float, card: Card
) -> None:
    result = search(request(*asked), budget(gibibytes, ram), Options(), card)
    assume(isinstance(result, Plan))
    assert isinstance(result, Plan)
    assert result.seconds is not None
    for trade in result.trades:
        assert trade.seconds_gained <= result.seconds * TIE
        assert trade.host_more_bytes > 0 or trade.device_more_bytes > 0


@settings(max_examples=400)
@given(asked=TASKS, gibibytes=st.floats(1, 12) | st.floats(1, 80), ram=st.none() | st.floats(8, 64), card=CARDS)
def test_a_plan_with_its_margin_never_exceeds_the_budget(
    asked: tuple[str, str], gibibytes: float, ram: float | None, card: Card
) -> None:
    result = search(request(*asked), budget(gibibytes, ram), Options(), card)
    if isinstance(result, Refusal):
        assert result.smallest_bytes > (result.budget.usable_bytes if result.memory == "device" else ram * GIB)  # type: ignore[operator]
        return
    config = RunConfig("x", "", "simulated", result.request, result.strategy)
    peaks = [card(config, stage.component).peak_device_bytes for stage in result.stages]
    assert result.peak_device_bytes == max(peaks)
    assert max(peaks) + result.budget.margin <= result.budget.vram_bytes
    assert ram is None or result.host_bytes <= ram * GIB - result.budget.system


@settings(max_examples=400)
@given(
    asked=TASKS,
    low=st.floats(2, 12) | st.floats(2, 80),
    more=st.floats(0, 30),
    ram=st.none() | st.floats(8, 64),
    card=CARDS,
)
def test_a_larger_budget_is_never_slower(
    asked: tuple[str, str], low: float, more: float, ram: float | None, card: Card
) -> None:
    small, large = (search(request(*asked), budget(g, ram), Options(offers=False), card) for g in (low, low + more))
    assume(isinstance(small, Plan))
    assert isinstance(large, Plan)
    assert isinstance(small, Plan)
    assert small.seconds is not None
    assert large.seconds is not None
    # Steps within 1 % of the resident transformer's count as equal, and of those the thriftier plan may be 1 % slower.
    assert large.seconds <= small.seconds * (1 + NEGLIGIBLE) * (1 + TIE)

"""A plan simulated whole: how often it is made again, what it costs to wait, and the whole run's figures in the plan's terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from planner_card import Card, plan
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import BudgetError, WanvramError
from wanvram.planner import Budget, Plan, Refusal, StageForecast
from wanvram.planner.search import Options
from wanvram.predict import plan as module
from wanvram.predict.plan import Forecasts, _stages, plan_run
from wanvram.record import Failure, RunRecord, Times
from wanvram.spans import Memory, Span
from wanvram.units import GIB, MIB

REQUEST = Request.for_task("t2v-1.3B", size="832*480", sample_steps=10)
CONFIG = RunConfig("x", "", "simulated", REQUEST, Strategy())
BUDGET = Budget(8 * GIB, ram_bytes=64 * GIB, gpu="h200")
NONE = Memory(0, 0, 0)


def span(kind: str, component: str | None, seconds: float | None, peak: int = 0, name: str = "x", **more: Any) -> Span:
    return Span(name, kind, component, NONE, Memory(peak, 10 * peak, 100 * peak), NONE, seconds=seconds, **more)


def record(peak: int, failure: Failure | None = None) -> RunRecord:
    high = Memory(0, 0, peak)
    stages = [Span("denoise", "stage", "dit", high, high, high, seconds=1.0)]
    return RunRecord("x", True, {}, stages=stages, times=Times(in_all_seconds=77.0), failure=failure)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Forecasts are made by hand and one after the other; no machine is asked."""
    card = Card()
    monkeypatch.setattr(module, "simulate_stage", card)
    monkeypatch.setattr(module, "forecasts_ahead", lambda *_: iter(()))
    return card


def whole_runs(monkeypatch: pytest.MonkeyPatch, *records: RunRecord) -> list[tuple[RunConfig, dict[str, Any]]]:
    """The whole runs that are simulated in turn, and what was asked for each."""
    asked: list[tuple[RunConfig, dict[str, Any]]] = []
    left = iter(records)

    def simulate(config: RunConfig, **how: Any) -> tuple[RunRecord, None]:
        asked.append((config, how))
        return next(left), None

    monkeypatch.setattr(module, "simulate", simulate)
    return asked


# --- forecasts and their progress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "said"),
    [(3, "; about 2 more, 210 s left"), (2, "; about 1 more, 180 s left"), (1, ""), (0, "")],
)
def test_progress_says_what_is_left_with_five_forecasts_for_the_whole_run(
    expected: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 130.0))
    shown: list[str] = []
    forecasts = Forecasts(shown.append, expected, _start=100.0)
    found = forecasts(CONFIG, "dit")
    assert shown == [f"forecast 1: dit {found.peak_device_bytes / MIB:,.1f} MiB{said}"]


def test_the_time_left_is_that_of_the_forecasts_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 130.0))
    shown: list[str] = []
    forecasts = Forecasts(shown.append, 4, _start=100.0)
    for component in ("text_encoder", "dit", "vae_decoder"):
        forecasts(CONFIG, component)
    assert [line.partition("; ")[2] for line in shown] == [
        "about 3 more, 240 s left",
        "about 2 more, 105 s left",
        "about 1 more, 60 s left",
    ]


def test_a_forecast_is_made_once_and_again_where_the_run_around_it_is_another(card: Card) -> None:
    forecasts = Forecasts()
    first = forecasts(CONFIG, "dit")
    assert forecasts(replace(CONFIG, name="y", strategy=Strategy(vae_tile=30)), "dit") is first
    assert len(card.calls) == 1
    for other in (
        replace(CONFIG, strategy=Strategy(offload=True)),
        replace(CONFIG, gpu="rtx4090"),
        replace(CONFIG, link="pcie4"),
        replace(CONFIG, weights="tiny"),
        replace(CONFIG, request=replace(REQUEST, frame_num=5)),
    ):
        forecasts(other, "dit")
    assert len(card.calls) == 6


def test_what_is_likely_to_be_asked_is_forecast_ahead_once(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    made = StageForecast("dit", 5 * MIB, 0, 0, 0, 0, 1.0, 1.0)
    rounds: list[Any] = []

    def ahead(*asked: Any) -> Iterator[tuple[tuple[RunConfig, str], StageForecast]]:
        rounds.append(asked)
        yield (CONFIG, "dit"), made

    monkeypatch.setattr(module, "forecasts_ahead", ahead)
    shown: list[str] = []
    forecasts = Forecasts(shown.append)
    for _ in range(2):
        forecasts.look_ahead(REQUEST, BUDGET, Strategy())
    assert (len(rounds), shown) == (1, ["forecast 1: dit 5.0 MiB"])
    assert forecasts(CONFIG, "dit") is made
    assert card.calls == []


def test_a_plan_looks_ahead_with_what_the_user_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "forecasts_ahead", lambda *given: asked.append(given) or iter(()))
    whole_runs(monkeypatch, record(GIB))
    plan_run(replace(CONFIG, strategy=Strategy(precision="fp16")), BUDGET)
    ((request, budget, base, _),) = asked
    assert (request, budget, base.precision) == (REQUEST, BUDGET, "fp16")


# --- a plan and its whole run ------------------------------------------------------------------------------------------------


def test_a_plan_has_the_whole_runs_figures_and_lossy_offers_unless_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_runs(monkeypatch, record(GIB), record(GIB))
    result, whole = plan_run(CONFIG, BUDGET)
    assert isinstance(result, Plan)
    assert whole is not None
    assert (result.peak_device_bytes, result.seconds, result.budget) == (GIB, 77.0, BUDGET)
    assert {next(iter(offer.change)) for offer in result.offers} == {"weight_storage", "vae_precision"}
    plain, _ = plan_run(CONFIG, BUDGET, offers=False)
    assert isinstance(plain, Plan)
    assert plain.offers == ()
    assert not any("read from disk" in note for note in (*result.notes, *plain.notes))


@pytest.mark.parametrize(("offers", "more"), [(True, 9), (False, 7)])
def test_progress_expects_three_forecasts_a_component_and_ends_with_the_whole_run(
    offers: bool, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_runs(monkeypatch, record(GIB))
    shown: list[str] = []
    plan_run(CONFIG, BUDGET, offers=offers, show=shown.append)
    assert f"; about {more} more, " in shown[0]
    assert shown.count("simulating the whole run") == 1


def test_forecasts_that_were_made_before_count(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_runs(monkeypatch, record(GIB), record(GIB))
    known = Forecasts()
    plan_run(CONFIG, BUDGET, offers=False, forecasts=known)
    count = len(card.calls)
    plan_run(CONFIG, BUDGET, offers=False, forecasts=known)
    assert len(card.calls) == count > 0


def test_blocks_on_disk_bring_a_note_on_how_fast_they_are_taken_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_runs(monkeypatch, record(GIB), record(GIB))
    disk, _ = plan_run(
        replace(CONFIG, request=Request.for_task("t2v-14B")), Budget(8 * GIB, ram_bytes=9 * GIB, gpu="h200")
    )
    assert isinstance(disk, Plan)
    assert disk.strategy.weights_in == "disk"
    assert disk.notes[-1].startswith("blocks are read from disk in every pass: times assume ")


@pytest.mark.parametrize(("above", "plans"), [(0, 1), (1, 2)])
def test_a_whole_run_a_byte_above_what_the_margin_allows_is_planned_again(
    above: int, plans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = whole_runs(monkeypatch, record(BUDGET.device_limit + above), record(GIB))
    result, _ = plan_run(CONFIG, BUDGET, offers=False)
    assert isinstance(result, Plan)
    assert (len(asked), result.budget) == (plans, BUDGET)
    assert result.peak_device_bytes == (BUDGET.device_limit if plans == 1 else GIB)


def test_each_plan_keeps_as_much_more_free_as_its_forecasts_said_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Budget] = []
    found: list[Plan | Refusal] = []
    search = module.search

    def searching(request: Request, budget: Budget, *more: Any) -> Plan | Refusal:
        tried.append(budget)
        found.append(search(request, budget, *more))
        return found[-1]

    monkeypatch.setattr(module, "search", searching)
    limit = BUDGET.device_limit
    whole_runs(monkeypatch, record(limit + 100 * MIB), record(limit + 50 * MIB), record(GIB))
    plan_run(CONFIG, BUDGET, offers=False)
    margins = [budget.margin - BUDGET.margin for budget in tried]
    forecasts = [result.peak_device_bytes for result in found if isinstance(result, Plan)]
    assert margins == [0, limit + 100 * MIB - forecasts[0], limit + 50 * MIB - forecasts[1]]
    assert margins == sorted(margins)


@pytest.mark.parametrize(("gibibytes", "made", "asked"), [(8, "3 plans", 3), (2, "the only plan", 1)])
def test_after_three_plans_or_the_last_that_fits_it_is_a_budget_error(
    gibibytes: int, made: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(gibibytes * GIB, ram_bytes=64 * GIB, gpu="h200")
    above = 100 * MIB if asked == 3 else 8 * GIB
    runs = whole_runs(monkeypatch, *[record(budget.device_limit + above)] * 4)
    with pytest.raises(BudgetError) as caught:
        plan_run(CONFIG, budget, offers=False)
    amount = "100.0 MiB" if asked == 3 else "8.00 GiB"
    assert str(caught.value) == (
        f"{made} for {gibibytes}.00 GiB needed more when simulated whole, the last {amount} above what the margin allows; give that "
        "much more"
    )
    assert len(runs) == asked


def test_what_fits_nowhere_is_a_refusal_and_simulated_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = whole_runs(monkeypatch)
    result, none = plan_run(CONFIG, Budget(GIB, gpu="h200"))
    assert isinstance(result, Refusal)
    assert (none, runs) == (None, [])


def test_the_whole_run_is_under_the_cap_without_spans_of_blocks_and_without_a_cap_where_it_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = whole_runs(monkeypatch, record(1, Failure("oom", "no room")), record(GIB))
    plan_run(CONFIG, BUDGET, offers=False)
    assert [how for _, how in asked] == [{"video": True}, {"unlimited": True, "video": True}]
    assert {config.memory_limit_bytes for config, _ in asked} == {8 * GIB}
    assert {config.measurement.profile_memory for config, _ in asked} == {False}
    asked = whole_runs(monkeypatch, record(1, Failure("error", "the disk is full")), record(GIB))
    with pytest.raises(WanvramError, match="the plan could not be simulated to its end: the disk is full"):
        plan_run(CONFIG, BUDGET, offers=False)
    assert len(asked) == 1


# --- the whole run in the plan's terms ---------------------------------------------------------------------------------------


def made(together: int = 1) -> Plan:
    result = plan(REQUEST, BUDGET, Options(offers=False), Card())
    stages = [replace(s, host_bytes=11, base_bytes=22, together=together) for s in result.stages]
    return replace(result, stages=tuple(stages))


def told(*spans: Span, together: int = 1) -> dict[str, StageForecast]:
    return {s.component: s for s in _stages(made(together), RunRecord("x", True, {}, stages=list(spans)))}


STEP = span("step", "dit", 2.0)


def test_a_stages_time_is_that_of_its_spans_less_the_steps_at_the_usual_pace() -> None:
    found = told(
        span("load", "dit", 3.0, 4),
        span("stage", "dit", 30.0, 7, "denoise", children=[STEP]),
        span("stage", None, 5.0, 1, "save"),
    )
    dit = found["dit"]
    assert (dit.seconds_per_step, dit.seconds, dit.together) == (2.0, 13.0, 1)
    assert (dit.peak_allocated_bytes, dit.peak_reserved_bytes, dit.peak_device_bytes) == (7, 70, 700)
    assert (dit.base_bytes, dit.host_bytes) == (0, 11)
    save = found["save"]
    assert (save.seconds, save.seconds_per_step, save.base_bytes, save.host_bytes, save.together) == (
        5.0,
        None,
        0,
        0,
        1,
    )
    assert list(found) == ["dit", "save"]


def test_a_load_without_a_time_does_not_hide_the_stages_and_a_stage_without_one_is_unknown() -> None:
    timed = told(span("load", "text_encoder", None), span("stage", "text_encoder", 4.0), STEP)
    assert (timed["text_encoder"].seconds, timed["text_encoder"].seconds_per_step) == (4.0, None)
    assert told(span("load", "text_encoder", 3.0), span("stage", "text_encoder", None))["text_encoder"].seconds is None
    assert told(span("stage", "dit", 4.0, name="denoise"))["dit"].seconds == 4.0, "steps that nobody timed"


def test_steps_of_several_videos_count_for_all_of_them() -> None:
    """Two videos from seeds of the one prompt: ten steps of both."""
    found = told(span("stage", "dit", 30.0, name="denoise", videos=2, children=[STEP]), together=2)
    assert (found["dit"].seconds, found["dit"].together) == (10.0, 2)


def test_base_memory_is_the_largest_load_or_as_forecast_where_there_was_none() -> None:
    def load(before: int, after: int) -> Span:
        return replace(span("load", "dit", 1.0), start=Memory(before, 0, 0), end=Memory(after, 0, 0))

    assert told(load(5, 50), load(10, 40))["dit"].base_bytes == 45
    assert told(span("stage", "dit", 1.0, name="denoise"))["dit"].base_bytes == 22


def test_device_memory_that_is_not_known_is_none_of_a_stage() -> None:
    unknown = replace(span("stage", "dit", 1.0), peak=Memory(5, 6, None))
    assert told(unknown)["dit"].peak_device_bytes == 0


def test_a_record_without_stages_leaves_the_forecasts() -> None:
    assert _stages(made(), RunRecord("x", True, {})) == made().stages

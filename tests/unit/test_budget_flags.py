"""`generate --vram_budget` on the good path: whose memory, which card and which RAM the planner is given, and what runs then."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from planner_card import Card
from wanvram import knobs
from wanvram.cli import generate
from wanvram.cli.budget import budget_of, planned
from wanvram.cli.flags import config_from_flags
from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.planner import Budget, Plan
from wanvram.predict import plan as predict_plan
from wanvram.units import GIB

TOTAL, AVAILABLE = 64 * GIB, 40 * GIB
asked_of_nvml: list[str] = []


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4090 of which 20 of 23.5 GiB are free, and 40 of 64 GiB of RAM."""

    def first_gpu() -> SimpleNamespace:
        asked_of_nvml.append("here")
        return SimpleNamespace(name="NVIDIA GeForce RTX 4090", memory=lambda: (20 * GIB, int(23.52 * GIB)))

    asked_of_nvml.clear()
    monkeypatch.setattr("wanvram.cli.budget.first_gpu", first_gpu)
    monkeypatch.setattr("wanvram.machine.host.total_ram_bytes", lambda: TOTAL)
    monkeypatch.setattr("wanvram.machine.host.available_ram_bytes", lambda: AVAILABLE)


def run(*flags: str, device: str = "auto", gpu: str | None = None) -> tuple[RunConfig, Budget, RunConfig]:
    """The configuration typed, the budget that was planned for, and the configuration that runs."""
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    args = parser.parse_args(["--task", "t2v-14B", "--size", "1280*720", "--weights", "random", *flags])
    config = config_from_flags(args, device=device, weights="random", gpu=gpu, memory_limit_bytes=None)
    budgets: list[Budget] = []

    def plan_run(config: RunConfig, budget: Budget, *, offers: bool, show: Callable[[str], None]) -> tuple[Plan, None]:
        assert not offers
        show("forecast 1")
        budgets.append(budget)
        result = predict_plan.search(
            config.request, budget, predict_plan.Options(config.strategy, offers=False), Card()
        )
        assert isinstance(result, Plan)
        return result, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_plan, "plan_run", plan_run)
        ready, prediction = planned(config, args)
    assert prediction is None
    return config, budgets[0], ready


def test_without_ram_the_plan_keeps_to_what_is_available_of_this_machine() -> None:
    _, budget, _ = run("--vram_budget", "8GiB")
    assert (budget.ram_bytes, budget.system) == (TOTAL, TOTAL - AVAILABLE)
    assert budget.host_limit("pageable") < AVAILABLE


def test_where_little_is_in_use_an_eighth_of_the_ram_is_still_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanvram.machine.host.available_ram_bytes", lambda: TOTAL - GIB)
    _, budget, _ = run("--vram_budget", "8GiB")
    assert budget.system == TOTAL // 8


def test_a_plan_for_later_counts_all_of_the_ram_less_the_systems_share() -> None:
    budget = budget_of("8GiB", None, None)
    assert (budget.ram_bytes, budget.system) == (TOTAL, TOTAL // 8)


def test_ram_that_is_stated_counts_and_not_this_machines() -> None:
    _, budget, _ = run("--vram_budget", "8GiB", "--ram", "32GiB")
    assert (budget.ram_bytes, budget.system) == (32 * GIB, 4 * GIB)


def test_the_card_here_is_planned_for() -> None:
    _, budget, ready = run("--vram_budget", "8GiB")
    assert (budget.card.key, budget.vram_bytes, ready.gpu) == ("rtx4090", 8 * GIB, budget.gpu)


def test_a_plan_before_a_run_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    run("--vram_budget", "8GiB")
    assert "forecast 1" in capsys.readouterr().err


def test_auto_is_what_is_free_on_the_card_here_and_says_so() -> None:
    _, budget, _ = run("--vram_budget", "auto")
    assert budget.vram_bytes == 20 * GIB
    assert "20.00 GiB of the 23.52 GiB of the NVIDIA GeForce RTX 4090 are free now" in budget.notes


def test_a_card_that_is_named_wins_over_the_card_here_also_under_auto() -> None:
    for amount in ("8GiB", "auto"):
        _, budget, ready = run("--vram_budget", amount, gpu="rtx3060ti")
        assert (budget.card.key, ready.gpu) == ("rtx3060ti", "rtx3060ti"), amount
    assert budget.ram_bytes is None, "the RAM of this machine is not that beside another card"


def test_the_simulated_device_does_not_plan_for_the_card_here() -> None:
    _, budget, ready = run("--vram_budget", "8GiB", device="simulated")
    assert budget.card.key == "h200"
    assert budget.ram_bytes is None
    assert ready.gpu == "h200"


def test_ram_alone_is_refused_and_says_what_it_belongs_to() -> None:
    with pytest.raises(InputError, match="--ram: limits what --vram_budget plans; give that, too"):
        run("--ram", "32GiB")


def test_the_budget_and_a_cap_beside_it_are_refused() -> None:
    with pytest.raises(InputError, match="--vram_budget and --vram: give one of them"):
        run("--vram_budget", "8GiB", "--vram", "6GiB")


def test_what_runs_has_the_plans_strategy_under_the_budget_as_a_cap() -> None:
    config, budget, ready = run("--vram_budget", "8GiB")
    result = predict_plan.search(config.request, budget, predict_plan.Options(config.strategy, offers=False), Card())
    assert isinstance(result, Plan)
    assert ready.memory_limit_bytes == 8 * GIB
    assert knobs.ATTENTION.set(ready.strategy, "auto") == result.strategy
    assert knobs.ATTENTION.of(ready.strategy) != "auto", "what the plan assumed is asked for by its name"
    assert ready.strategy.load_strategy == "block"


def test_a_budget_above_the_card_is_capped_at_what_the_card_offers() -> None:
    _, budget, ready = run("--vram_budget", "24GiB")
    assert budget.vram_bytes == 24 * GIB
    assert ready.memory_limit_bytes == budget.card.total_bytes < 24 * GIB


def test_without_the_flag_nothing_is_planned_and_nothing_changed() -> None:
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    args = parser.parse_args(["--task", "t2v-14B", "--weights", "random"])
    config = config_from_flags(args, device="auto", weights="random", gpu=None, memory_limit_bytes=None)
    assert planned(config, args) == (config, None)
    assert asked_of_nvml == []

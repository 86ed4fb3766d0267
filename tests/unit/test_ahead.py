"""Forecasts made ahead, in forked processes, are those that the search would have made itself."""

from __future__ import annotations

import pytest

from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.planner import Budget, Plan
from wanvram.predict import ahead, plan
from wanvram.predict.ahead import forecasts_ahead
from wanvram.predict.plan import Forecasts, plan_run
from wanvram.units import GIB

REQUEST = Request.for_task("t2v-1.3B", size="832*480", frame_num=5, sample_steps=2)
CONFIG = RunConfig("x", "", "simulated", REQUEST, Strategy())


def test_a_plan_with_forecasts_made_ahead_is_the_plan_without(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(3 * GIB, ram_bytes=64 * GIB)
    alone, _ = plan_run(CONFIG, budget, offers=False)
    asked: list[str] = []
    real = plan.simulate_stage
    monkeypatch.setattr(plan, "processes_here", lambda: 2)
    monkeypatch.setattr(plan, "simulate_stage", lambda config, name: asked.append(name) or real(config, name))
    together, _ = plan_run(CONFIG, budget, offers=False, forecasts=Forecasts())
    assert isinstance(together, Plan)
    assert isinstance(alone, Plan)
    assert together == alone
    assert "text_encoder" not in asked  # it was there already


def test_the_machine_is_looked_at_once_before_processes_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would import flash-attn-4 with its compiler to know whether it can be; what fails is left to the search."""
    looked_at: list[RunConfig] = []

    def looking(config: RunConfig, **_: object) -> None:
        looked_at.append(config)
        raise InputError("no such card")

    monkeypatch.setattr(ahead, "simulated_device", looking)
    found = list(forecasts_ahead(REQUEST, Budget(3 * GIB, ram_bytes=64 * GIB), Strategy(), 1))
    assert len(looked_at) == 1
    assert {component for (_, component), _ in found} == {"text_encoder", "dit", "vae_decoder"}
    assert not list(forecasts_ahead(REQUEST, Budget(3 * GIB), Strategy(), 0))
    assert len(looked_at) == 1


def test_no_process_is_forked_once_cuda_has_started_or_where_cores_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 16)
    assert ahead.processes_here() == ahead.MOST_PROCESSES
    monkeypatch.setattr(ahead.torch.cuda, "is_initialized", lambda: True)
    assert ahead.processes_here() == 0
    monkeypatch.setattr(ahead.torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 2)
    assert ahead.processes_here() == 0

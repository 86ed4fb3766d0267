"""What a promise to a user rests on: forecasts beside the whole run, refusals that help, figures of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner_card import Card, plan
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.planner.budget import MARGIN_SHARE, PINNED_SHARE, PROCESS_BYTES, Budget
from wanvram.planner.forecasts import StageForecast, Trials, components_of
from wanvram.planner.result import Plan, Refusal
from wanvram.planner.search import Options, search
from wanvram.predict.simulate import simulate
from wanvram.predict.stage import simulate_stage
from wanvram.units import GIB, MIB

# --- a forecast beside the stage of a whole run ------------------------------------------------------------------------------

RUNS = {
    "t2v-1.3B": Strategy(offload=True),
    "flf2v-14B": Strategy(load_strategy="block", offload=True, vae_tile=30, expandable_segments=True),
    "vace-1.3B": Strategy(load_strategy="block", offload=True, expandable_segments=True),
}


@pytest.mark.parametrize("task", list(RUNS))
def test_a_forecast_of_one_component_is_near_what_the_whole_run_takes_for_it(task: str) -> None:
    """Outside the allocator it is never too low and at most 16 MiB too high; inside, what earlier stages left in the cache is
    missing, which costs up to 105 MiB (vace's transformer). The plan is simulated whole for that reason."""
    request = Request.for_task(task, size="832*480", frame_num=81, sample_steps=4)
    config = RunConfig("x", "", "simulated", request, RUNS[task], Measurement(profile_memory=False))
    record, _ = simulate(config, unlimited=True, video=True)
    assert record.failure is None
    for component in components_of(request):
        spans = [span for span in record.stages if span.planned == component]
        forecast = simulate_stage(replace(config, strategy=replace(RUNS[task], offload=False)), component)
        assert forecast == simulate_stage(config, component), "offload is no question of one component"
        device, reserved, allocated = (
            max(getattr(span.peak, name) for span in spans)
            for name in ("device_bytes", "reserved_bytes", "allocated_bytes")
        )
        outside = forecast.peak_device_bytes - forecast.peak_reserved_bytes - (device - reserved)
        assert -8 * MIB <= outside <= 16 * MIB, component
        assert -105 * MIB <= forecast.peak_reserved_bytes - reserved <= 72 * MIB, component
        assert -18 * MIB <= forecast.peak_allocated_bytes - allocated <= 12 * MIB, component


# --- refusals ----------------------------------------------------------------------------------------------------------------


def search_on(card: Card, request: Request, budget: Budget) -> Plan | Refusal:
    return search(request, budget, Options(), card)


@pytest.mark.parametrize("gibibytes", [1, 2, 2.5, 3, 3.5])
def test_a_refusal_of_two_pictures_names_at_least_five_frames_that_fit(gibibytes: float) -> None:
    request = Request.for_task("flf2v-14B", size="1280*720")
    budget = Budget(int(gibibytes * GIB), gpu="h200")
    result = search_on(Card(), request, budget)
    assert isinstance(result, Refusal)
    for other in result.alternatives:
        assert other.frame_num >= 5
        assert isinstance(search_on(Card(), replace(request, size=other.size, frame_num=other.frame_num), budget), Plan)


def test_some_refusal_of_two_pictures_does_name_fewer_frames() -> None:
    request = Request.for_task("flf2v-14B", size="1280*720")
    results = [search_on(Card(), request, Budget(n * GIB // 4, gpu="h200")) for n in range(8, 20)]
    assert any(other.frame_num < 81 for r in results if isinstance(r, Refusal) for other in r.alternatives)


def test_the_smallest_budget_counts_the_text_encoder_on_the_host_where_it_is_the_largest() -> None:
    class LargeLayers(Card):
        def text_encoder(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
            base, extra, host, seconds = super().text_encoder(request, s)
            return 6 * base, extra, host, seconds

    request = Request.for_task("t2v-1.3B", size="832*480")
    refused = search_on(LargeLayers(), request, Budget(GIB, gpu="h200"))
    assert isinstance(refused, Refusal)
    assert refused.component != "text_encoder", "it may compute on the host"
    again = search_on(LargeLayers(), request, Budget(refused.smallest_bytes, gpu="h200"))
    assert isinstance(again, Plan)
    assert again.strategy.t5_cpu


# --- the figures of a plan ---------------------------------------------------------------------------------------------------


def test_what_an_offer_saves_of_the_peak_is_the_plans_peak_less_the_peak_with_it() -> None:
    request = Request.for_task("t2v-14B", size="1280*720")
    for gibibytes in (6, 8, 12):
        result = plan(request, Budget(gibibytes * GIB, gpu="h200"), Options(), Card())
        assert result.offers
        for offer in result.offers:
            lossy = replace(result.strategy, **offer.change)
            config = RunConfig("x", "", "simulated", request, lossy)
            peak = max(Card()(config, stage.component).peak_device_bytes for stage in result.stages)
            assert offer.peak_saved_bytes == result.peak_device_bytes - peak, offer.change


def test_the_host_memory_of_a_plan_contains_the_process() -> None:
    result = plan(Request.for_task("t2v-14B", size="1280*720"), Budget(6 * GIB, gpu="h200"), Options(), Card())
    assert PROCESS_BYTES == 3 * GIB
    assert result.host_bytes == 3 * GIB + max(stage.host_bytes for stage in result.stages) > 3 * GIB


def test_a_text_encoder_that_computes_on_the_host_is_not_held_to_the_share_that_may_be_pinned() -> None:
    """10.4 GiB of T5: three quarters of 14 GiB are 10.5, less the system and the process 7: only pageable RAM of 18 holds it."""
    request = Request.for_task("t2v-1.3B", size="832*480")
    host = Card().text_encoder(request, Strategy(t5_cpu=True))[2]
    budget = Budget(8 * GIB, ram_bytes=host * 4 // 3 - GIB, gpu="h200", system_bytes=0)
    assert budget.host_limit("pinned") < host <= budget.host_limit("pageable") + 3 * GIB
    roomy = replace(budget, ram_bytes=host + PROCESS_BYTES)
    assert roomy.host_limit("pinned") < host <= roomy.host_limit("pageable")
    trials = Trials(request, roomy, Card())
    on_host = Strategy(load_strategy="block", weights_in="pinned", t5_cpu=True)
    assert trials.fits_host("text_encoder", on_host)
    assert not trials.fits_host("text_encoder", replace(on_host, t5_cpu=False))


def test_the_shares_of_a_budget_are_one_and_a_half_per_cent_and_three_quarters() -> None:
    assert (MARGIN_SHARE, PINNED_SHARE) == (0.015, 0.75)
    assert Budget(100 * GIB, gpu="h200").margin == 100 * GIB * 15 // 1000
    assert Budget(2 * GIB, gpu="h200").margin == 64 * MIB, "and at least 64 MiB"
    assert Budget(8 * GIB, ram_bytes=64 * GIB, gpu="h200", system_bytes=0).host_limit("pinned") == 48 * GIB


def test_the_second_correction_of_a_plan_starts_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole runs above what is allowed by 100 and 50 MiB: each search keeps at least as much more free than the one before."""
    from wanvram.predict import plan as module
    from wanvram.record import RunRecord
    from wanvram.spans import Memory, Span

    budget = Budget(6 * GIB, gpu="h200")
    above = iter([100 * MIB, 50 * MIB, -GIB])
    margins: list[int] = []

    def whole(*_: object) -> RunRecord:
        high = Memory(0, 0, budget.device_limit + next(above))
        return RunRecord("x", True, {}, True, None, [], [Span("denoise", "stage", "dit", high, high, high)], {}, {})

    def searching(request: Request, tried: Budget, options: Options, _: object) -> Plan | Refusal:
        margins.append(tried.margin - budget.margin)
        return search(request, tried, options, Card())

    monkeypatch.setattr(module, "_whole_run", whole)
    monkeypatch.setattr(module, "search", searching)
    monkeypatch.setattr(module.Forecasts, "look_ahead", lambda *_: None)
    config = RunConfig("x", "", "simulated", Request.for_task("t2v-14B", size="1280*720"), Strategy())
    module.plan_run(config, budget, offers=False)
    first, second, third = margins
    assert (first, second >= 100 * MIB, third >= second + 50 * MIB) == (0, True, True)


def test_what_was_rejected_is_listed_with_the_largest_gain_first() -> None:
    lists = [
        plan(Request.for_task(task, size=size), Budget(int(g * GIB), ram_bytes=ram, gpu="h200"), Options(), Card(copy_rate=rate)).rejected
        for task, size in (("t2v-14B", "1280*720"), ("i2v-14B", "832*480"))
        for g in (5.5, 6, 8, 12)
        for ram in (None, 24 * GIB)
        for rate in (6e9, 55e9)
    ]  # fmt: skip
    gains = [[r.seconds_gained or 0.0 for r in found] for found in lists]
    assert any(len(set(found)) > 1 for found in gains)
    assert all(found == sorted(found, reverse=True) for found in gains)


def test_half_precision_is_offered_as_bf16_from_the_a100_on_and_as_fp16_before() -> None:
    for gpu, half in (("t4", "fp16"), ("a100-80gb", "bf16"), ("h200", "bf16")):
        asked = Options(Strategy(precision="fp32"))
        result = plan(Request.for_task("t2v-1.3B", size="832*480"), Budget(12 * GIB, gpu=gpu), asked, Card())
        assert {"precision": half} in [offer.change for offer in result.offers], gpu


def test_of_two_candidates_whose_times_are_unknown_the_first_is_taken() -> None:
    class OneUnknown(Card):
        """Streaming with the passes joined has no time."""

        def __call__(self, config: RunConfig, component: str) -> StageForecast:
            forecast = super().__call__(config, component)
            unknown = component == "dit" and config.strategy.attention_slicing
            return replace(forecast, seconds_per_step=None) if unknown else forecast

    request = Request.for_task("t2v-14B", size="1280*720")
    result = plan(request, Budget(8 * GIB, gpu="h200"), Options(), OneUnknown())
    assert not result.strategy.attention_slicing
    assert result.seconds is not None

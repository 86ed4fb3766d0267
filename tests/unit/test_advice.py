"""Advice: what is tried, what is promised, what is written. Tiny models on the simulated device, and forecasts made by hand."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from planner_card import CONTEXT, Card
from wanvram.advice import Advice, write_advice
from wanvram.cli.flags import add_request_flags, add_strategy_flags, config_from_flags
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError, WanvramError
from wanvram.planner.forecasts import choices, components_of
from wanvram.predict.advice import _Estimate, _ranked, advise, predict
from wanvram.predict.simulate import simulate
from wanvram.record import ComponentRecord, Failure, RunRecord
from wanvram.report.runs import read_run
from wanvram.spans import Memory, Span
from wanvram.units import GIB, MIB

HOLES = 3 << 20  # reserved and not allocated, in every stage of the fakes


def run_of(task: str = "t2v-14B", weights: str = "random", limit: int | None = None, **knobs: Any) -> RunConfig:
    size = "1280*720" if task.endswith("14B") else "832*480"
    request = Request.for_task(task, size=size, frame_num=5 if weights == "tiny" else 81, sample_steps=2)
    strategy = Strategy(**{"offload": True} | knobs)
    return RunConfig("run", "", "simulated", request, strategy, weights=weights, memory_limit_bytes=limit)


def record_of(config: RunConfig, stages: tuple[Span, ...] = (), device: str = "simulated:h200") -> RunRecord:
    simulated = device.startswith("simulated")
    return RunRecord(device, simulated, config.to_dict(), None, None, [], list(stages), {}, {})


@dataclass
class Whole:
    """Whole runs that are what the forecasts of the card say, and one surprise; remembers what was asked."""

    card: Card = field(default_factory=Card)
    surprise: dict[str, int] = field(default_factory=dict)  # knob -> bytes that the forecasts did not see
    limit: int | None = None
    asked: list[tuple[Strategy, bool]] = field(default_factory=list)

    def __call__(self, config: RunConfig, unlimited: bool) -> RunRecord:
        self.asked.append((config.strategy, unlimited))
        free = replace(config, memory_limit_bytes=None)
        forecasts = {c: self.card(free, c) for c in components_of(config.request)}
        resident = 0 if config.strategy.offload else sum(f.base_bytes for f in forecasts.values())
        more = sum(
            n for knob, n in self.surprise.items() if getattr(config.strategy, knob) != getattr(Strategy(), knob)
        )
        spans: list[Span] = []
        for name, f in forecasts.items():
            allocated = f.peak_device_bytes - CONTEXT + more + (resident - f.base_bytes if resident else 0) - HOLES
            reserved = allocated + (0 if config.strategy.expandable_segments else HOLES)
            if resident and spans:  # only a component that leaves gives back what it reserved
                reserved = max(reserved, spans[-1].peak.reserved_bytes)
            peak = Memory(allocated, reserved, reserved + CONTEXT)
            component = "vae" if name.startswith("vae") else name
            stage = {"vae_decoder": "decode", "vae_encoder": "encode_video", "dit": "denoise"}.get(name, name)
            spans.append(Span(stage, "stage", component, peak, peak, peak, seconds=f.seconds))
        if self.limit is not None and not unlimited and max(s.peak.device_bytes or 0 for s in spans) > self.limit:
            return replace(record_of(config, tuple(spans)), failure=Failure("oom", "too large"))
        bases = {"vae" if n.startswith("vae") else n: f.base_bytes for n, f in forecasts.items()}
        components = [ComponentRecord(n, 0, b, 0, 0) for n, b in bases.items()]
        return replace(record_of(config, tuple(spans)), components=components)


def asked_of(config: RunConfig, whole: Whole, card: Card | None = None, **more: Any) -> list[Advice]:
    return advise(config, record_of(config), forecast=card or Card(), predict=whole, **more)


# --- tiny models on the simulated device -------------------------------------------------------------------------------------

TINY = run_of("t2v-1.3B", "tiny", offload=False)


@cache
def simulated(**knobs: Any) -> RunRecord:
    record, _ = simulate(replace(TINY, strategy=replace(TINY.strategy, **knobs)))
    return record


def device_peak(record: RunRecord) -> int:
    peak = record.peak()
    assert peak is not None
    assert peak.device_bytes is not None
    return peak.device_bytes


@pytest.fixture(scope="module")
def tiny() -> list[Advice]:
    return advise(TINY, simulated())


def test_each_saving_is_that_of_two_whole_runs(tiny: list[Advice]) -> None:
    before = simulated().peak()
    assert before is not None
    assert len(tiny) == 3
    for advice in tiny:
        changed = simulated(**advice.knobs)
        after, where = changed.peak(), changed.peak_span()
        assert after is not None
        assert where is not None
        assert advice.saved_bytes == device_peak(simulated()) - device_peak(changed) > 0
        assert advice.saved_allocated_bytes == before.allocated_bytes - after.allocated_bytes
        assert (advice.peak_device_bytes, advice.peak_stage_after) == (after.device_bytes, where.name)
        times = [sum(s.seconds or 0.0 for s in record.stages) for record in (simulated(), changed)]
        assert advice.seconds == pytest.approx(times[1] - times[0], abs=1e-3)


def test_the_best_is_first_and_no_other_single_change_saves_more(tiny: list[Advice]) -> None:
    every: list[dict[str, Any]] = [{"load_strategy": "block"}, {"offload": True}, {"vae_tile": 30}, {"vae_tile": 20}]
    every += [{"t5_cpu": True}, {"attention_slicing": True}, {"expandable_segments": True}, {"rows_per_chunk": 1560}]
    every += [{"weight_storage": "fp8"}, {"vae_precision": "bf16"}]
    savings: dict[str, int] = {}
    for knobs in every:
        knob = next(iter(knobs))
        saved = device_peak(simulated()) - device_peak(simulated(**knobs))
        savings[knob] = max(savings.get(knob, 0), saved)
    assert [a.saved_bytes for a in tiny] == sorted(savings.values(), reverse=True)[:3]


def test_the_change_is_written_as_flags_that_the_command_line_takes(tiny: list[Advice]) -> None:
    parser = argparse.ArgumentParser()
    add_request_flags(parser)
    add_strategy_flags(parser)
    for advice in [*tiny, *asked_of(run_of(offload=False), Whole(), count=9)]:
        args = parser.parse_args(advice.change.split())
        config = config_from_flags(args, device="simulated", weights="tiny", gpu=None, memory_limit_bytes=None)
        assert {knob: getattr(config.strategy, knob) for knob in advice.knobs} == advice.knobs


# --- what is tried -----------------------------------------------------------------------------------------------------------


def test_only_components_that_a_change_touches_and_that_own_the_peak_are_forecast() -> None:
    card = Card()
    advices = asked_of(run_of(), Whole(), card)
    assert advices[0].knobs == {"load_strategy": "block"}
    assert {component for component, *_ in card.calls} == {"dit", "text_encoder"}
    keys = [choices(name, s) for name, s, _ in card.calls]
    assert len(keys) == len(set(keys))


def test_of_changes_that_save_the_same_the_lossless_one_is_first_and_then_the_fastest() -> None:
    advices = asked_of(run_of(load_strategy="block"), Whole())
    assert [a.knobs for a in advices[:2]] == [{"vae_tile": 80}, {"vae_precision": "bf16"}]
    assert advices[0].saved_bytes == advices[1].saved_bytes  # both leave the transformer the largest
    assert (advices[0].seconds or 0.0) > (advices[1].seconds or 0.0)
    assert all("attention_slicing" not in a.knobs for a in advices)


def test_resident_blocks_are_given_up_whole_or_half_and_one_value_of_a_knob_is_advised() -> None:
    whole = Whole()
    advices = asked_of(run_of(load_strategy="block", resident_blocks=30), whole, count=9)
    assert [a.knobs for a in advices if "resident_blocks" in a.knobs] == [{"resident_blocks": 0}]
    assert len({tuple(a.knobs) for a in advices}) == len(advices)


def test_without_offload_the_weights_of_every_component_count_in_every_stage() -> None:
    advices = asked_of(run_of(offload=False), Whole())
    (offload,) = [a for a in advices if a.knobs == {"offload": True}]
    forecasts = [Card()(run_of(), name) for name in ("text_encoder", "dit", "vae_decoder")]
    weights = sum(f.base_bytes for f in forecasts)
    together = max(weights - f.base_bytes + f.peak_device_bytes for f in forecasts)
    assert offload.saved_bytes == together - max(f.peak_device_bytes for f in forecasts)
    assert offload.seconds == 0.0


def test_what_an_earlier_stage_leaves_reserved_does_not_hide_what_a_change_saves() -> None:
    advices = asked_of(run_of("vace-14B", offload=False, load_strategy="block"), Whole())
    assert {"vae_tile": 80} in [a.knobs for a in advices]


def test_a_forecast_that_promised_too_much_does_not_keep_a_better_change_out() -> None:
    found = asked_of(run_of(), Whole(surprise={"load_strategy": 40 * GIB, "weight_storage": 5 * GIB}), count=1)
    honest = asked_of(run_of(), Whole(), count=9)
    fp8 = next(a for a in honest if a.knobs == {"weight_storage": "fp8"})
    assert found[0].knobs == {"weight_storage": "fp8"}
    assert found[0].saved_bytes == fp8.saved_bytes - 5 * GIB


def test_whole_runs_are_made_for_few_changes_only() -> None:
    whole = Whole()
    advices = asked_of(run_of(), whole)
    assert len(advices) == 3
    assert len(whole.asked) <= 5  # the base and the three best, and one that a forecast may have overrated


def test_nothing_is_advised_where_nothing_saves() -> None:
    lean = run_of(
        load_strategy="block",
        vae_tile=20,
        vae_precision="bf16",
        attention_slicing=True,
        rows_per_chunk=1,
        weight_storage="fp8",
        expandable_segments=True,
    )
    assert asked_of(lean, Whole()) == []


def test_a_card_without_bf16_is_offered_fp16_and_fp32_is_offered_half_precision() -> None:
    config = replace(run_of("t2v-1.3B", load_strategy="block", precision="fp16"), gpu="t4")
    old = advise(config, record_of(config, device="simulated:t4"), count=9, forecast=Card(), predict=Whole())
    assert {"vae_precision": "fp16"} in [a.knobs for a in old]
    full = asked_of(run_of(precision="fp32"), Whole(), count=9)
    assert [(a.knobs, a.lossless) for a in full if "precision" in a.knobs] == [({"precision": "bf16"}, False)]
    assert all("weight_storage" not in a.knobs for a in full)


# --- what it is compared with ------------------------------------------------------------------------------------------------


def test_a_simulated_record_of_the_same_configuration_is_not_simulated_again() -> None:
    whole = Whole()
    config = run_of(load_strategy="block")
    base = whole(config, False)
    assert base is not None
    again = Whole()
    advices = advise(config, record_of(config, base.stages), forecast=Card(), predict=again)
    assert config.strategy not in [strategy for strategy, _ in again.asked]
    assert advices == asked_of(config, Whole())


def test_a_measured_record_is_compared_with_the_prediction_of_its_configuration() -> None:
    config = replace(run_of(), device="cuda")
    high = Memory(90 * GIB, 90 * GIB, 90 * GIB)
    measured = record_of(config, (Span("denoise", "stage", "dit", high, high, high),), device="cuda:NVIDIA H200")
    whole = Whole()
    assert advise(config, measured, forecast=Card(), predict=whole) == asked_of(run_of(), Whole())
    assert whole.asked[0] == (config.strategy, False)


def test_the_card_of_a_measured_record_must_be_known() -> None:
    config = replace(run_of(), device="cuda")
    with pytest.raises(InputError, match="GPU 'NVIDIA Imaginary 9' is unknown"):
        advise(config, record_of(config, device="cuda:NVIDIA Imaginary 9"), forecast=Card(), predict=Whole())


def test_a_run_that_does_not_fit_is_compared_on_a_card_without_limit() -> None:
    whole = Whole(limit=24 * GIB)
    config = run_of(limit=24 * GIB)
    advices = asked_of(config, whole)
    compared = [unlimited for _, unlimited in whole.asked][: -len(advices)]
    assert compared == [False, True, *[True] * (len(compared) - 2)]
    assert [replace(a, fits=None) for a in advices] == asked_of(run_of(), Whole())
    assert advices[0].peak_device_bytes < 24 * GIB


def test_of_a_run_that_does_not_fit_each_change_says_whether_it_fits_then() -> None:
    whole = Whole(limit=24 * GIB)
    advices = asked_of(run_of(limit=24 * GIB), whole)
    assert [a.fits for a in advices] == [a.peak_device_bytes <= 24 * GIB for a in advices]
    assert {a.fits for a in advices} == {True, False}
    assert {a.base_device_bytes - a.saved_bytes - a.peak_device_bytes for a in advices} == {0}
    assert {a.base_device_bytes > 24 * GIB for a in advices} == {True}


def test_out_of_memory_is_a_failure_and_none_on_a_card_without_limit() -> None:
    config = run_of("t2v-1.3B", "tiny", limit=GIB)
    failure = predict(config, False).failure
    assert failure is not None
    assert failure.kind == "oom"
    assert predict(config, True).failure is None


def test_progress_names_the_flags_of_a_change() -> None:
    said: list[str] = []
    advices = asked_of(run_of(), Whole(), show=said.append)
    assert {line.partition(":")[0] for line in said} >= {advice.change for advice in advices}


def test_a_run_that_ends_early_for_another_reason_than_memory_is_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = replace(record_of(TINY), failure=Failure("error", "the disk is full"))
    monkeypatch.setattr("wanvram.predict.advice.simulate", lambda config, **how: (failed, None))
    with pytest.raises(WanvramError, match="could not be simulated to its end: the disk is full"):
        predict(TINY, False)


def test_an_interrupted_simulation_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> RunRecord:
        return replace(record_of(TINY), failure=Failure("interrupted", "interrupted by the user"))

    monkeypatch.setattr("wanvram.predict.simulate.run_on", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted by the user"):
        simulate(TINY)


def test_a_defect_of_the_simulation_is_raised_so_that_debug_can_show_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("wanvram.engine.pipeline.Pipeline.encode_text", defect)
    with pytest.raises(ZeroDivisionError):
        simulate(TINY)


# --- advice.json -------------------------------------------------------------------------------------------------------------


def test_the_report_reads_what_is_written_and_lossy_changes_say_so(tmp_path: Path) -> None:
    simulated().write(tmp_path / "record.json")
    advices = asked_of(run_of(), Whole())
    path = write_advice(tmp_path, advices)
    read = read_run(tmp_path).advice
    assert list(read) == advices
    assert [a.label.endswith(" (lossy)") for a in read] == [not a.lossless for a in advices]
    assert {a.lossless for a in advices} == {True, False}
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["advice"][0]["knobs"] == {"load_strategy": "block"}
    assert document["advice"][0]["peak_stage_after"] == advices[0].peak_stage_after


def test_the_page_on_strategy_names_every_knob() -> None:
    page = (Path(__file__).parents[2] / "docs" / "strategy.md").read_text(encoding="utf-8")
    assert [f.name for f in fields(Strategy) if f"**`{f.name}`**" not in page] == []


def test_a_knob_s_fastest_value_stands_for_it_where_it_saves_nearly_the_most() -> None:
    estimates = [
        _Estimate({"vae_tile": 80}, 90 * MIB, 0.1),
        _Estimate({"vae_tile": 30}, 98 * MIB, 0.4),
        _Estimate({"vae_tile": 20}, 100 * MIB, 2.5),
        _Estimate({"offload": True}, 99 * MIB, 0.0),
    ]
    assert [e.knobs for e in _ranked(estimates)] == [{"offload": True}, {"vae_tile": 30}]

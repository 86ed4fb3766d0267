"""Advice in its parts: which card, what an estimate is made of, what is simulated whole and in which order it is given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from planner_table import Table
from wanvram.advice import Advice
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError, WanvramError
from wanvram.predict import advice as module
from wanvram.predict.advice import (
    _advice,
    _best,
    _card,
    _changes,
    _Estimate,
    _estimate,
    _ranked,
    _reused,
    _Runs,
    advise,
    predict,
)
from wanvram.record import ComponentRecord, Failure, RunRecord
from wanvram.spans import Memory, Span
from wanvram.units import GIB, MIB

REQUEST = Request.for_task("t2v-1.3B", size="832*480", sample_steps=10)
OFFLOAD = Strategy(offload=True)
PARTS = {"text_encoder": "encode_text", "dit": "denoise", "vae_decoder": "decode", "prompt_extender": "extend"}


def config(strategy: Strategy = OFFLOAD, **given: Any) -> RunConfig:
    return RunConfig("x", "", "simulated", REQUEST, strategy, **given)


def span(component: str, peak: Memory, seconds: float | None = 1.0, kind: str = "stage") -> Span:
    owner = "vae" if component == "vae_decoder" else component
    return Span(PARTS[component], kind, owner, peak, peak, peak, seconds=seconds)


def record(
    peaks: dict[str, int], holes: int = 0, failure: Failure | None = None, seconds: float | None = 1.0
) -> RunRecord:
    """device: of each component, all of it reserved; `holes` of that is not allocated. Weights are a tenth of it."""
    stages = [span(name, Memory(peak - holes, peak, peak), seconds) for name, peak in peaks.items()]
    bases = [
        ComponentRecord("vae" if name == "vae_decoder" else name, 0, peak // 10, 0, 0) for name, peak in peaks.items()
    ]
    known = [base for base in bases if base.name != "prompt_extender"]
    return RunRecord("simulated:h200", True, config().to_dict(), None, None, known, stages, failure=failure)


@dataclass
class Whole:
    """Whole runs by what is changed; what is not said is as large as the base. asked: (strategy, unlimited)."""

    runs: dict[str, RunRecord] = field(default_factory=dict)
    base: RunRecord = field(default_factory=lambda: record({"dit": 100}))
    asked: list[tuple[Strategy, bool]] = field(default_factory=list)

    def __call__(self, asked: RunConfig, unlimited: bool) -> RunRecord:
        self.asked.append((asked.strategy, unlimited))
        changed = [name for name in self.runs if getattr(asked.strategy, name) != getattr(Strategy(offload=True), name)]
        return self.runs[changed[0]] if changed else self.base


def runs_of(base: RunRecord, asked: RunConfig | None = None, table: Table | None = None, whole: Any = None) -> _Runs:
    return _Runs(asked or config(), base, False, whole or Whole(base=base), table or Table())


# --- the card and the run that is compared with ------------------------------------------------------------------------------


def test_the_card_is_the_records_of_that_much_memory_or_the_configurations() -> None:
    def card(device: str, total: object = None, gpu: str | None = None) -> str:
        made = replace(record({"dit": 1}), device=device, environment={"gpu_total_bytes": total})
        return _card(config(gpu=gpu), made).key

    assert card("simulated:rtx4090", gpu="h200") == "rtx4090"
    assert card("cuda:NVIDIA H100 80GB HBM3") == "h100"
    assert card("cuda:NVIDIA A100", 40 * GIB) == "a100-40gb"
    assert card("cuda:NVIDIA A100", 80 * GIB) == "a100-80gb"
    assert (card("cpu", gpu="rtx4090"), card("cpu")) == ("rtx4090", "h200")
    with pytest.raises(InputError, match="several sizes"):
        card("cuda:NVIDIA A100", "40 GiB")


def test_a_record_is_the_base_itself_where_it_is_a_whole_simulation_of_the_same_settings() -> None:
    made = record({"dit": 100})
    assert _reused(config(), made) is made
    assert _reused(config(gpu="rtx4090"), made) is made, "the card is the record's"
    assert _reused(replace(config(), request=replace(REQUEST, base_seed=7)), made) is made
    assert _reused(replace(config(), device="cuda"), made) is made
    assert _reused(config(Strategy(offload=True, vae_tile=30)), made) is None
    assert _reused(replace(config(), request=replace(REQUEST, sample_steps=9)), made) is None
    assert _reused(config(), replace(made, simulated=False)) is None
    assert _reused(config(), replace(made, failure=Failure("oom", "too large"))) is None
    assert _reused(config(), replace(made, stages=[])) is None
    assert _reused(config(), replace(made, config={})) is None
    extended = replace(config(), request=replace(REQUEST, use_prompt_extend=True))
    assert _reused(extended, replace(made, config=extended.to_dict())) is None


def test_a_prediction_without_limit_has_no_cap_and_only_want_of_memory_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int | None, bool]] = []
    found = record({"dit": 1})

    def simulate(given: RunConfig, *, unlimited: bool) -> tuple[RunRecord, None]:
        asked.append((given.memory_limit_bytes, unlimited))
        return found, None

    monkeypatch.setattr(module, "simulate", simulate)
    capped = config(memory_limit_bytes=GIB)
    assert predict(capped, False) is predict(capped, True) is found
    assert asked == [(GIB, False), (None, True)]
    found = replace(found, failure=Failure("oom", "too large"))
    assert predict(capped, False).failure is not None
    found = replace(found, failure=Failure("error", "the disk is full"))
    with pytest.raises(WanvramError, match="the run could not be simulated to its end: the disk is full"):
        predict(capped, False)


# --- estimates ---------------------------------------------------------------------------------------------------------------


def test_the_peaks_of_the_components_are_their_highest_the_largest_first_with_holes_or_without() -> None:
    spans = [span("text_encoder", Memory(50, 60, 70)), span("dit", Memory(10, 80, 90)), span("dit", Memory(70, 75, 85))]
    base = replace(record({}), stages=[*spans, span("vae_decoder", Memory(5, 6, None))])
    runs = runs_of(base)
    assert list(runs.peaks(holes=True).items()) == [("dit", 90), ("text_encoder", 70), ("vae_decoder", 0)]
    assert list(runs.peaks(holes=False).items()) == [("dit", 80), ("text_encoder", 60), ("vae_decoder", 0)]


def test_expandable_segments_are_estimated_to_save_what_is_reserved_and_not_allocated_at_the_peak() -> None:
    base = replace(record({}), stages=[span("dit", Memory(60, 90, 100)), span("vae_decoder", Memory(80, 85, 95))])
    assert _estimate(runs_of(base), {"expandable_segments": True}) == _Estimate({"expandable_segments": True}, 10, 0.0)


def test_offload_is_estimated_to_save_the_weights_of_all_others_but_beside_a_prompt_extender() -> None:
    peaks = {"text_encoder": 200, "dit": 300, "vae_decoder": 400}
    alone = max(200 - 70, 300 - 60, 400 - 50)
    assert _estimate(runs_of(record(peaks)), {"offload": True}) == _Estimate({"offload": True}, 400 - alone, 0.0)
    assert _estimate(runs_of(record(peaks, holes=8)), {"offload": True}).saved_bytes == 400 - alone
    extended = record({"prompt_extender": 390} | peaks)
    assert _estimate(runs_of(extended), {"offload": True}).saved_bytes == 10, "the extender is alone in any case"


def table(**of: tuple[Any, Any]) -> Table:
    """(peak and base memory, seconds) of each component without and with blocks streamed; steps take no time."""

    def pick(number: int) -> Any:
        return lambda name, s: of[name][number] if s.load_strategy == "full" else of[f"{name}_streamed"][number]

    return Table(peak=pick(0), base=lambda name, s: pick(0)(name, s) // 10, step=lambda name, s: 0.0, seconds=pick(1))


STREAMED = table(text_encoder=(60, 1.0), text_encoder_streamed=(30, 4.0), dit=(100, 5.0), dit_streamed=(40, 7.0))


def test_an_estimate_is_the_next_highest_peak_after_what_the_forecasts_differ_by() -> None:
    change = {"load_strategy": "block"}
    peaks = {"dit": 1000, "text_encoder": 960, "vae_decoder": 950}
    assert _estimate(runs_of(record(peaks), table=STREAMED), change) == _Estimate(change, 50, 5.0)
    low = {"dit": 1000, "text_encoder": 960, "vae_decoder": 500}
    assert _estimate(runs_of(record(low), table=STREAMED), change).saved_bytes == 1000 - 940
    below = {"dit": 1000, "text_encoder": 930, "vae_decoder": 500}
    assert _estimate(runs_of(record(below), table=STREAMED), change) == _Estimate(change, 60, 2.0), (
        "not looked at: below in any case"
    )
    same = {"dit": 1000, "text_encoder": 940, "vae_decoder": 500}
    assert _estimate(runs_of(record(same), table=STREAMED), change) == _Estimate(change, 60, 2.0)


def test_without_offload_allocated_memory_counts_and_the_weights_of_others_that_become_smaller() -> None:
    change = {"load_strategy": "block"}
    base = record({"dit": 1000, "text_encoder": 960, "vae_decoder": 950}, holes=100)
    runs = runs_of(base, config(Strategy()), STREAMED)
    # dit: 900 - 3 of T5 - 60; text: 860 - 6 of the transformer - 30; decoder: 850 - 9 of both.
    assert _estimate(runs, change) == _Estimate(change, 900 - 841, 5.0)
    other = replace(base, stages=[*base.stages, span("prompt_extender", Memory(880, 980, 980))])
    assert _estimate(runs_of(other, config(Strategy()), STREAMED), change).saved_bytes == 20, (
        "no weights beside the extender"
    )


def test_times_that_are_unknown_cost_nothing_and_each_forecast_is_made_once() -> None:
    unknown = replace(STREAMED, seconds=lambda name, s: None, asked=[])
    runs = runs_of(
        record({"dit": 1000, "text_encoder": 960, "vae_decoder": 950}), config(memory_limit_bytes=GIB), unknown
    )
    for _ in range(2):
        assert _estimate(runs, {"load_strategy": "block"}).seconds == 0.0
    assert len(unknown.asked) == 4


def test_a_tiny_run_is_simulated_whole_for_its_estimate() -> None:
    base = record({"dit": 100})
    whole = Whole({"vae_tile": record({"dit": 70}), "t5_cpu": record({"dit": 10}, failure=Failure("oom", "x"))}, base)
    runs = runs_of(base, config(weights="tiny"), whole=whole)
    assert _estimate(runs, {"vae_tile": 30}) == _Estimate({"vae_tile": 30}, 30, 0.0)
    assert _estimate(runs, {"t5_cpu": True}).saved_bytes == 0
    runs.whole(Strategy(offload=True, vae_tile=30))
    assert len(whole.asked) == 2


def test_a_change_of_each_knob_is_tried_in_the_half_precision_of_the_card() -> None:
    changes = list(_changes(config(gpu="t4")))
    assert {"vae_precision": "fp16"} in changes
    assert {"vae_precision": "bf16"} in list(_changes(config()))
    assert {"vae_tile": 20} in changes


def test_of_one_knob_the_fastest_within_five_per_cent_stands_and_of_equals_the_lossless_one_comes_first() -> None:
    def made(name: str, value: object, saved: int, seconds: float) -> _Estimate:
        return _Estimate({name: value}, saved, seconds)

    tiles = [made("vae_tile", 80, 949, 0.1), made("vae_tile", 52, 950, 0.2), made("vae_tile", 20, 1000, 9.0)]
    assert [e.knobs for e in _ranked(tiles)] == [{"vae_tile": 52}]
    same_time = [made("vae_tile", 52, 960, 0.2), made("vae_tile", 40, 970, 0.2)]
    assert [e.knobs for e in _ranked(same_time)] == [{"vae_tile": 40}]
    others = [made("weight_storage", "fp8", 50, 0.0), made("t5_cpu", True, 50, 3.0), made("offload", True, 50, 1.0)]
    others.append(made("cfg", "x", 60, 9.0))
    assert [next(iter(e.knobs)) for e in _ranked(others)] == ["cfg", "offload", "t5_cpu", "weight_storage"]


# --- what is given -----------------------------------------------------------------------------------------------------------


def test_a_change_that_saves_nothing_or_does_not_end_is_no_advice() -> None:
    base = record({"dit": 100})
    for after, given in (
        (record({"dit": 99}), True),
        (record({"dit": 100}), False),
        (record({"dit": 101}), False),
        (record({"dit": 9}, failure=Failure("oom", "x")), False),
    ):
        found = _advice(runs_of(base, whole=Whole({"vae_tile": after}, base)), {"vae_tile": 30})
        assert (found is not None) is given


def test_advice_says_both_peaks_the_stage_that_then_has_it_and_the_time_of_the_stages_alone() -> None:
    base = record({"text_encoder": 60, "dit": 100, "vae_decoder": 80}, holes=3)
    after = record({"text_encoder": 60, "dit": 50, "vae_decoder": 80}, holes=5, seconds=1.2504)
    after = replace(after, stages=[span("dit", Memory(1, 1, 1), 500.0, "load"), *after.stages])
    assert _advice(runs_of(base, whole=Whole({"load_strategy": after}, base)), {"load_strategy": "block"}) == Advice(
        "--load_strategy block", 20, 0.751, True, 100, 80, None, {"load_strategy": "block"}, 97 - 75, "decode"
    )
    lossy = _advice(runs_of(base, whole=Whole({"weight_storage": after}, base)), {"weight_storage": "fp8"})
    assert lossy is not None
    assert not lossy.lossless
    for one, other in (
        (base, replace(after, stages=[span("dit", Memory(1, 1, 1), None)])),
        (record({"dit": 100}, seconds=None), after),
    ):
        unknown = _advice(runs_of(one, whole=Whole({"vae_tile": other}, one)), {"vae_tile": 30})
        assert unknown is not None
        assert unknown.seconds is None


def best(saved: dict[str, int], estimates: dict[str, int], count: int) -> tuple[list[str], list[str], list[str]]:
    """Knobs that are advised, that were simulated whole, and what was shown."""
    values = {
        "vae_tile": 30,
        "t5_cpu": True,
        "attention_slicing": True,
        "load_strategy": "block",
        "weight_storage": "fp8",
    }
    base = record({"dit": 100 * MIB})
    whole = Whole({name: record({"dit": 100 * MIB - n * MIB}) for name, n in saved.items()}, base)
    said: list[str] = []
    found = _best(
        runs_of(base, whole=whole),
        [_Estimate({n: values[n]}, s * MIB, 0.0) for n, s in estimates.items()],
        count,
        said.append,
    )
    tried = [next(n for n in estimates if getattr(s, n) == values[n]) for s, _ in whole.asked]
    return [next(iter(a.knobs)) for a in found], tried, said


def test_whole_runs_end_where_no_estimate_promises_more_than_the_last_that_is_advised() -> None:
    promised = {"vae_tile": 50, "t5_cpu": 40, "attention_slicing": 30, "load_strategy": 20}
    assert best(promised, promised, 2)[:2] == (["vae_tile", "t5_cpu"], ["vae_tile", "t5_cpu"])
    kept = {"vae_tile": 5, "t5_cpu": 40, "attention_slicing": 30, "load_strategy": 20}
    assert best(kept, promised, 2)[:2] == (["t5_cpu", "attention_slicing"], ["vae_tile", "t5_cpu", "attention_slicing"])
    assert best(promised, {"vae_tile": 50, "t5_cpu": 50}, 1)[:2] == (["vae_tile"], ["vae_tile"])
    more = {"vae_tile": 5, "t5_cpu": 6, "attention_slicing": 7, "load_strategy": 8}
    assert best(more, promised, 2)[:2] == (["load_strategy", "attention_slicing"], list(promised))
    assert best({"vae_tile": 0, "t5_cpu": 9}, promised, 3)[:2] == (["t5_cpu"], list(promised))


def test_what_saves_the_same_is_given_lossless_first_and_progress_is_in_gibibytes() -> None:
    same = {"weight_storage": 50, "vae_tile": 50}
    found, _, said = best(same, same, 2)
    assert found == ["vae_tile", "weight_storage"]
    assert said == ["--weight_storage fp8: 0.05 GiB less", "--vae_tile 30: 0.05 GiB less"]


def test_the_three_best_are_given_unless_a_number_is_asked_for_without_spans_of_single_blocks() -> None:
    measured: set[bool] = set()
    sizes = {"load_strategy": 40, "vae_tile": 50, "t5_cpu": 60, "attention_slicing": 70, "weight_storage": 80}

    def whole(asked: RunConfig, unlimited: bool) -> RunRecord:
        assert not unlimited
        measured.add(asked.measurement.profile_memory)
        changed = [n for n in sizes if getattr(asked.strategy, n) != getattr(OFFLOAD, n)]
        return record({"dit": sizes[changed[0]] if changed else 100})

    tiny = config(weights="tiny")
    found = advise(tiny, record({"dit": 100}), forecast=Table(), predict=whole)
    assert [next(iter(a.knobs)) for a in found] == ["load_strategy", "vae_tile", "t5_cpu"]
    assert [a.fits for a in found] == [None] * 3
    assert len(advise(tiny, record({"dit": 100}), count=9, forecast=Table(), predict=whole)) == 5, (
        "what saves nothing is left out"
    )
    assert measured == {False}


def test_a_run_that_does_not_fit_is_compared_without_limit_and_each_change_is_tried_under_it() -> None:
    asked: list[tuple[bool, bool]] = []

    def whole(given: RunConfig, unlimited: bool) -> RunRecord:
        tiled = given.strategy.vae_tile is not None
        asked.append((tiled, unlimited))
        failure = None if unlimited or tiled else Failure("oom", "x")
        return record({"dit": 50 if tiled else 60 if given.strategy.t5_cpu else 100}, failure=failure)

    tiny = config(weights="tiny")
    found = advise(tiny, replace(record({"dit": 100}), simulated=False), count=2, forecast=Table(), predict=whole)
    assert [(next(iter(a.knobs)), a.fits, a.base_device_bytes) for a in found] == [
        ("vae_tile", True, 100),
        ("t5_cpu", False, 100),
    ]
    assert asked[:2] == [(False, False), (False, True)]
    assert asked[-2:] == [(True, False), (False, False)]

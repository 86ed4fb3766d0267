"""Facts about what is read back and told: traces, comparisons, growth, owners, and the sentence for a peak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unit.test_analysis import record as analysed
from unit.test_compare import record as compared
from unit.test_timeline import Script
from unit.test_trace_reader import memory, op, saved
from wanvram.advice import Advice
from wanvram.analysis.compare import compare, judge, parse_condition
from wanvram.analysis.peak import unusable
from wanvram.analysis.stages import analyze_run, steady_growth
from wanvram.analysis.trace import read_trace
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.predict.simulate import simulate
from wanvram.record import Failure, Times
from wanvram.report.findings import advice_first
from wanvram.report.terminal import summarize
from wanvram.report.translations import Texts
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.clock import Costs
from wanvram.simulate.gpus import find_gpu
from wanvram.simulate.host import HOST
from wanvram.simulate.timeline import Timeline
from wanvram.spans import Memory, Span
from wanvram.timeline_record import AliveBlocks, TimelineMoment, TimelineSegment
from wanvram.units import GIB, MIB

# --- traces ------------------------------------------------------------------------------------------------------------------


def test_an_operator_that_starts_when_the_one_before_ends_is_not_called_by_it(tmp_path: Path) -> None:
    events = [op("aten::first", 10, 20), op("aten::second", 30, 10), memory(35, 8, 8)]
    found = {o.name: o for o in read_trace(saved(tmp_path / "t.json", events)).operators_by_time}
    assert found["aten::first"].self_seconds == pytest.approx(20e-6), "nothing was called inside it"
    assert found["aten::second"].self_seconds == pytest.approx(10e-6)


def test_memory_at_the_very_end_of_an_operator_is_its_own(tmp_path: Path) -> None:
    events = [op("aten::mm", 10, 20), memory(30, 64, 64), op("aten::later", 40, 5)]
    found = {o.name: o.allocated_bytes for o in read_trace(saved(tmp_path / "t.json", events)).operators_by_memory}
    assert found["aten::mm"] == 64


@pytest.mark.parametrize("duration", [-1.0, -0.5, -0.001])
def test_an_event_that_lasts_less_than_nothing_is_left_out_and_named(duration: float, tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path / "t.json", [op("aten::mm", 10, 20), op("aten::bad", 40, duration)]))
    assert [o.name for o in trace.operators_by_time] == ["aten::mm"]
    assert any("lasts" in note or "dur" in note for note in trace.notes)


# --- comparison --------------------------------------------------------------------------------------------------------------


def failed(**more: Any) -> Any:
    return replace(compared(**more), failure=Failure("oom", "no room", "denoise", "dit"))


def test_without_a_condition_a_failed_run_does_not_fail_the_build() -> None:
    comparison = compare(["a", "b"], [compared(), failed()])
    assert judge(comparison, []) == []
    assert [v.label for v in judge(comparison, [parse_condition("peak.device_bytes > 100GiB")])] == ["b"]


def test_a_failed_run_whose_figure_also_breaks_the_condition_is_said_once() -> None:
    comparison = compare(["a", "b"], [compared(), failed(factor=9)])
    assert [v.condition for v in judge(comparison, [parse_condition("peak.device_bytes > +1%")])] == ["the run failed"]


@pytest.mark.parametrize("text", ["peak.device_bytes > 5s", "fragmentation.at_peak > 5s", "host.pinned_bytes > 1s"])
def test_seconds_of_what_is_no_time_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_condition(text)


# --- growth and stages -------------------------------------------------------------------------------------------------------


def test_seven_steps_of_forty_that_grew_are_no_leak_and_half_of_them_are_one() -> None:
    def ends(grown: int, steps: int = 43) -> list[int]:
        """`grown` of the steps, evenly spread, each a mebibyte more."""
        return [MIB * (step * grown // steps) for step in range(steps)]

    assert steady_growth(ends(8)) == (False, 0)
    assert steady_growth(ends(20))[0] is True


def test_of_two_stages_of_one_name_each_has_its_own_moment() -> None:
    """VACE loads one half of its VAE before the transformer and the other after it."""
    request = Request.for_task("vace-1.3B", size="832*480", frame_num=5, sample_steps=2)
    config = RunConfig("x", "", "simulated", request, Strategy(offload=True), Measurement(profile_memory=False))
    made, watched = simulate(config, timeline=True)
    assert isinstance(watched.observer, Timeline)
    found = [s for s in analyze_run(made, watched.observer.record()).stages if s.name == "load vae"]
    assert len(found) == 2
    assert [s.peak.allocated_bytes for s in found] == [
        s.peak.allocated_bytes for s in made.stages if s.name == "load vae"
    ]
    assert found[0].peak.allocated_bytes != found[1].peak.allocated_bytes


# --- owners ------------------------------------------------------------------------------------------------------------------


def test_a_librarys_buffer_is_no_activation_that_a_hole_could_be_too_small_for() -> None:
    def alive(nbytes: int, component: str | None, operation: str) -> AliveBlocks:
        return AliveBlocks(nbytes, 1, component, "denoise", None, operation, None, None)

    segments = (TimelineSegment(100 * MIB, ((0, 60 * MIB, "active"), (60 * MIB, 40 * MIB, "inactive"))),)
    groups = (alive(50 * MIB, None, "cublas workspace"), alive(10 * MIB, "dit", "aten.mm"))
    moment = TimelineMoment("peak", 0, 60 * MIB, 100 * MIB, "denoise", "dit", groups, segments)
    found = unusable(moment)
    assert found is not None
    assert (found.largest_allocation_bytes, found.too_small_bytes) == (10 * MIB, 0)


# --- reports -----------------------------------------------------------------------------------------------------------------


def test_a_peak_in_loading_is_said_to_be_weights() -> None:
    run = analysed()
    high = Memory(200 * MIB, 220 * MIB, 300 * MIB)
    stages = [Span("load dit", "load", "dit", Memory(MIB, MIB, MIB), high, high), *run.stages[3:]]
    text = summarize(replace(run, stages=stages), Texts())
    assert "there when loading began" in text
    assert "of weights loaded" in text


def test_equal_groups_are_ordered_by_their_sum() -> None:
    alive = (("small", 30 * MIB), ("large", 50 * MIB), ("small", 30 * MIB))
    stopped = replace(analysed(), failure=Failure("oom", "no room", "denoise", "dit", 1, 2, 3, alive))
    lines = [line.split() for line in summarize(stopped).splitlines() if line.endswith(("small", "large"))]
    assert [(line[0], line[-1]) for line in lines] == [("60.0", "small"), ("50.0", "large")]


def advice(change: str, saved_bytes: int, *, lossless: bool) -> Advice:
    from dataclasses import fields

    given: dict[str, Any] = {"change": change, "saved_bytes": saved_bytes, "lossless": lossless, "seconds": 0.0}
    names = {field.name for field in fields(Advice)}
    assert set(given) <= names, names
    return Advice(**given)


def test_a_lossless_change_comes_before_a_larger_lossy_one() -> None:
    found = advice_first([advice("fp8", 900, lossless=False), advice("tile", 100, lossless=True)])
    assert [a.change for a in found] == ["tile", "fp8"]


def test_of_two_videos_the_report_says_what_one_takes_and_of_one_nothing() -> None:
    at = Memory(MIB, MIB, MIB)

    def stages(count: int) -> list[Span]:
        names = ("denoise", "decode", "save")
        return [Span(f"{n} {i}", "stage", "dit", at, at, at, seconds=10.0, part=n) for i in range(count) for n in names]

    def text(count: int, whole: float | None) -> str:
        made = replace(analysed(), stages=stages(count), times=Times(1.0, whole))
        return summarize(made)

    assert "2 videos" in text(2, 80.0)
    assert "40.0 s" in text(2, 80.0)
    assert "videos" not in text(2, None)
    assert "videos" not in text(1, 80.0)


# --- the allocator -----------------------------------------------------------------------------------------------------------


def test_a_gap_of_exactly_the_size_is_used_again() -> None:
    addresses: list[int] = []
    model = CachingAllocator(
        AllocatorSettings(),
        total_bytes=2**35,
        on_segment=lambda event, address, *_: addresses.append(address) if event == "segment_alloc" else None,
    )
    first, second = model.malloc(64 * MIB), model.malloc(64 * MIB)
    model.free(first)
    model.empty_cache()
    model.malloc(64 * MIB)
    model.free(second)
    assert addresses[2] == addresses[0] != addresses[1]


def test_a_pool_of_pages_has_addresses_for_nine_eighths_of_the_device() -> None:
    mapped: list[int] = []
    model = CachingAllocator(
        AllocatorSettings(expandable_segments=True),
        total_bytes=8 * GIB,
        on_segment=lambda event, address, *_: mapped.append(address),
    )
    model.malloc(60 * MIB)
    model.malloc(1000)
    large, small = mapped[0], mapped[-1]
    assert large - small == 9 * GIB
    assert model.reserved_bytes == 62 * MIB, "addresses are no memory"


# --- the timeline ------------------------------------------------------------------------------------------------------------


def test_whoever_listened_to_segments_before_the_timeline_still_hears_them() -> None:
    heard: list[str] = []
    allocator = CachingAllocator(total_bytes=2**35, on_segment=lambda event, *_: heard.append(event))
    Timeline(allocator, outside_bytes=0)
    allocator.free(allocator.malloc(30 * MIB))
    allocator.empty_cache()
    assert heard == ["segment_alloc", "segment_free"]


def test_a_peak_at_the_first_event_of_a_stage_belongs_to_it() -> None:
    script = Script()
    script.timeline.begin("load dit", "load", "dit")
    script.take("w", 10 * MIB)
    script.timeline.end()
    script.timeline.begin("denoise", "stage", "dit")
    script.take("a", 90 * MIB)
    script.give("a")
    script.timeline.end()
    (peak,) = [m for m in script.timeline.record().moments if m.label == "peak"]
    assert (peak.stage, peak.allocated_bytes) == ("denoise", 100 * MIB)


# --- the clock ---------------------------------------------------------------------------------------------------------------


def test_a_convolution_from_three_channels_is_as_narrow_as_one_to_three() -> None:
    costs = Costs(find_gpu("h200"), HOST)

    def work(inputs: int, outputs: int) -> float:
        x = torch.empty(1, inputs, 4, 64, 64, device="meta")
        weight = torch.empty(outputs, inputs, 3, 3, 3, device="meta")
        out = SimpleNamespace(shape=(1, outputs, 4, 64, 64), nbytes=outputs * 4 * 64 * 64 * 4)
        flops, rate, _ = costs._convolution((x, weight), out)
        return flops / rate

    assert work(3, 96) == pytest.approx(work(96, 3))
    assert work(3, 96) > 3 / 96 * work(96, 96)

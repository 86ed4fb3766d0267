"""Facts about profiler traces at their edges: what is kept, what belongs to what, and from where on a thing is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unit.test_field_files import half, without_totals
from unit.test_trace_reader import memory, op, saved
from wanvram.analysis import trace as module
from wanvram.analysis.trace import read_trace
from wanvram.analysis.trace_summary import OUTSIDE, MemoryCurve, Thread, TraceSummary
from wanvram.errors import InputError

HOUR = 3600 * 1_000_000  # microseconds
DAY = 24 * HOUR


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def trace(*events: Any, **more: Any) -> TraceSummary:
        return read_trace(saved(tmp_path / "t.json", list(events), **more))

    return trace


def without(event: dict[str, Any], *keys: str) -> dict[str, Any]:
    return event | {"args": {key: value for key, value in event["args"].items() if key not in keys}}


def main(trace: TraceSummary) -> MemoryCurve:
    assert trace.main is not None
    return trace.main


# --- devices -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ((1, 0), "cuda:0"),
        ((0, -1), "cpu"),
        ((12, 1), "xpu:1"),
        ((13, 0), "mps:0"),
        ((5, 2), "device type 5:2"),
        ((-1, -1), "a device of unknown kind"),
    ],
)
def test_a_device_is_called_by_its_kind_and_its_number(device: tuple[int, int], name: str, read: Any) -> None:
    assert main(read(memory(1, 5, 5, device=device))).device == name


def test_a_memory_event_that_names_no_device_is_of_one_of_unknown_kind(read: Any) -> None:
    assert main(read(without(memory(1, 5, 5), "Device Type", "Device Id"))).device == "a device of unknown kind"


def test_an_accelerator_comes_before_a_cpu_that_held_more_and_the_fuller_one_before_the_other(read: Any) -> None:
    events = [memory(1, 9, 9, 0, device=(0, -1)), memory(2, 3, 3), memory(3, 4, 4, device=(1, 1))]
    assert [curve.device for curve in read(*events).memory] == ["cuda:1", "cuda:0", "cpu"]


def test_1024_devices_are_kept_and_another_is_left_out(read: Any) -> None:
    trace = read(*(memory(1, 1, 1, device=(1, number)) for number in range(1025)))
    assert len(trace.memory) == 1024
    assert trace.notes == ("1 event is left out: event 1025 is of another device after 1,024 of them",)


def test_65536_threads_are_kept_and_another_is_left_out() -> None:
    collector = module._Collector("t.json")
    collector.threads = [Thread()] * 65_535
    for thread in ("last", "another", "last"):
        collector.take(op("a", 1, 1, tid=thread))
    assert (collector.events, collector.left_out["strange"]) == (3, 1), "one that is known goes on"
    assert collector.firsts == {"strange": "event 2 is of another thread after 65,536 of them"}


@pytest.mark.parametrize(
    ("rank", "told"), [(0, 0), (7, 7), (2**31 - 1, 2**31 - 1), (2**31, None), (-1, None), ("3", None), (True, None)]
)
def test_a_rank_is_a_whole_number_that_a_process_can_have(rank: Any, told: int | None, read: Any) -> None:
    trace = read(op("a", 1, 1), distributedInfo={"rank": rank, "world_size": rank})
    assert (trace.rank, trace.world_size) == (told, told)
    assert (read(op("a", 1, 1)).rank, read(op("a", 1, 1)).world_size) == (None, None)


# --- memory ------------------------------------------------------------------------------------------------------------------


def test_without_totals_what_is_allocated_first_counts_from_nothing(read: Any) -> None:
    trace = read(without_totals(memory(1, 100, 0)), without_totals(memory(2, 50, 0)), memory(3, 1, 400))
    assert [point[1] for point in main(trace).points] == [100, 150, 400]
    assert trace.notes == (
        "2 memory events of cuda:0 have no Total Allocated (torch before 1.10): "
        "the sum of what was allocated and freed since the trace began stands for it",
    )


def test_a_missing_total_never_falls_below_nothing(read: Any) -> None:
    missing = [without_totals(memory(2, -300, 0)), without_totals(memory(3, 50, 0)), without_totals(memory(4, 180, 0))]
    trace = read(memory(1, 100, 100), *missing, memory(5, 20, 20))
    assert [point[1] for point in main(trace).points] == [100, 0, 0, 30, 20]


def test_a_total_of_nothing_needs_no_bytes_beside_it(read: Any) -> None:
    trace = read(without(memory(1, 5, 0), "Bytes"), memory(2, 5, 5))
    assert (main(trace).events, trace.notes) == (2, ())
    assert {o.name: o.allocations for o in trace.operators_by_memory} == {OUTSIDE: 1}, "it says of no allocation"


def test_the_largest_number_of_bytes_is_kept_and_one_more_is_left_out(read: Any) -> None:
    most = (1 << 62) - 1
    trace = read(memory(1, 1, most), memory(2, 1, most + 1), memory(3, -(1 << 62), 0), memory(4, -(1 << 62) - 1, 0))
    assert (main(trace).peak_allocated_bytes, main(trace).events) == (most, 2)
    assert trace.notes[0].startswith(f"2 events are left out: the first, event 2 has Total Allocated {most + 1};")


def test_memory_that_is_held_while_more_is_allocated_is_not_fragmented(read: Any) -> None:
    curve = main(read(memory(0, 90, 90, 60), memory(10, -60, 30, 60), memory(20, 0, 30, 30)))
    assert (curve.fragmentation_at_peak, curve.fragmentation_max) == (0.0, 0.5)
    assert curve.fragmentation_mean == pytest.approx(0.25), "half of the time"


def test_while_nothing_is_held_nothing_is_fragmented(read: Any) -> None:
    curve = main(read(memory(0, 0, 0, 0), memory(10, 5, 5, 10), memory(20, -5, 0, 0)))
    assert (curve.fragmentation_max, curve.fragmentation_mean) == (0.5, 0.25)


def test_of_a_single_memory_event_the_mean_is_what_it_says(read: Any) -> None:
    curve = main(read(memory(5, 30, 30, 40)))
    assert (curve.fragmentation_at_peak, curve.fragmentation_mean, curve.fluctuation_bytes) == (0.25, 0.25, 0)


def test_one_byte_that_is_held_is_known_to_be_held(read: Any) -> None:
    trace = read(memory(5, 1, 1, 1), op("mine", 1, 9, "user_annotation"))
    curve = main(trace)
    assert trace.annotations[0].peak_reserved_bytes == 1
    assert (curve.peak_reserved_bytes, curve.reserved_at_peak_bytes, curve.fragmentation_at_peak) == (1, 1, 0.0)


def test_what_is_held_counts_from_its_own_highest_time(read: Any) -> None:
    curve = main(read(memory(0, 9, 90, 100), memory(10, -9, 10, 200), memory(20, 1, 11, 150)))
    assert (curve.peak_seconds, curve.peak_reserved_seconds) == (0.0, 10e-6)
    assert (curve.peak_reserved_bytes, curve.reserved_at_peak_bytes) == (200, 100)


# --- spans -------------------------------------------------------------------------------------------------------------------


def peak_between(read: Any, start: float, end: float) -> tuple[int | None, int | None]:
    events = [memory(10, 1, 900, 950), memory(20, 1, 100, 960), memory(30, 1, 500, 970), memory(40, 1, 50, 0)]
    (span,) = read(*events, op("mine", start, end - start, "user_annotation")).annotations
    return span.peak_allocated_bytes, span.peak_reserved_bytes


def test_a_span_sees_what_was_there_when_it_began_and_what_comes_until_it_ends(read: Any) -> None:
    assert peak_between(read, 15, 18) == (900, 950)
    assert peak_between(read, 20, 25) == (100, 960), "from its first microsecond on"
    assert peak_between(read, 20, 30) == (500, 970), "to its last one"
    assert peak_between(read, 20, 29) == (100, 960)
    assert peak_between(read, 12, 45) == (900, 970)


def test_a_span_before_any_memory_event_has_no_peak_and_one_of_unknown_reserved_memory_only_the_other(
    read: Any,
) -> None:
    assert peak_between(read, 2, 9) == (None, None)
    assert peak_between(read, 2, 10) == (900, 950)
    assert peak_between(read, 42, 44) == (50, None)


def test_a_span_of_another_age_is_not_told(read: Any) -> None:
    start = 1757 * 10**12
    inside, lost = op("mine", start + 5, 3, "user_annotation"), op("lost", 17, 3, "user_annotation")
    running = op("never ended", start + 6, 3 * DAY, "user_annotation")
    trace = read(*(op("a", start + 10 * i, 5) for i in range(4)), inside, lost)
    assert [(span.name, round(span.start * 1e6), round(span.end * 1e6)) for span in trace.annotations] == [
        ("mine", 5, 8)
    ]
    assert [span.name for span in read(op("a", start, 5), inside, running).annotations] == ["mine", "never ended"]


def test_spans_come_in_the_order_in_which_they_began_and_of_two_that_began_together_the_shorter_first(
    read: Any,
) -> None:
    given = {"c": (30, 5), "a": (10, 90), "ProfilerStep#1": (15, 5), "b": (20, 9), "inside b": (20, 3)}
    trace = read(*(op(name, *when, "user_annotation") for name, when in given.items()))
    assert [span.name for span in trace.annotations] == ["a", "inside b", "b", "c"]
    assert [span.name for span in trace.steps] == ["ProfilerStep#1"]


# --- the time span -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hours", "whole"), [(24.5, True), (25.1, False), (-24.5, False), (-23.9, True)])
def test_a_day_without_any_event_ends_a_recording(hours: float, whole: bool, read: Any) -> None:
    start = 1000 * HOUR
    trace = read(op("a", start, 5), op("a", start + 10, 5), op("b", start + hours * HOUR, 5))
    assert trace.seconds == pytest.approx(abs(hours) * 3600 + (5e-6 if hours > 0 else 15e-6) if whole else 15e-6)
    said = f"1 event is left out of the time span, over a day away from the rest: event 3 at {start + hours * HOUR:.0f} microseconds"
    assert trace.notes[:-1] == (() if whole else (said,))


def test_the_recording_is_where_most_of_the_events_are(read: Any) -> None:
    early, late = [op("a", HOUR + i, 1) for i in range(3)], [op("b", 90 * HOUR + i, 1) for i in range(4)]
    assert read(*early, *late).seconds == pytest.approx(4e-6)
    assert read(*early, *late[:2]).seconds == pytest.approx(3e-6)
    note = read(*early, *late).notes[0]
    assert note.startswith("3 events are left out of the time span")
    assert note.endswith(f"the first, event 1 at {HOUR} microseconds")


def test_an_event_that_takes_31_days_is_kept_and_a_longer_one_is_not(read: Any) -> None:
    assert read(op("a", 1, 31 * DAY)).operators_by_time[0].seconds == pytest.approx(31 * 86_400)
    trace = read(op("a", 1, 31 * DAY + 1))
    assert trace.operators_by_time == ()
    assert trace.notes[0] == f"1 event is left out: event 1 lasts {31 * DAY + 1} microseconds"


def test_an_event_that_takes_no_time_is_kept(read: Any) -> None:
    (found,) = read(op("a", 5, 0)).operators_by_time
    assert (found.calls, found.seconds) == (1, 0.0)


# --- operators ---------------------------------------------------------------------------------------------------------------


def alone(trace: TraceSummary) -> dict[str, int]:
    return {o.name: round(o.self_seconds * 1e6) for o in trace.operators_by_time}


def test_an_operator_has_its_time_without_those_it_called_itself(read: Any) -> None:
    events = [op("outer", 0, 100), op("middle", 10, 60), op("inner", 20, 30), op("other", 80, 10)]
    assert alone(read(*events)) == {"outer": 30, "middle": 30, "inner": 30, "other": 10}
    assert alone(read(*reversed(events))) == alone(read(*events)), "in whatever order they are written"


def test_of_two_operators_that_start_together_the_longer_one_called_the_other(read: Any) -> None:
    short, long = op("short", 10, 5), op("long", 10, 50)
    assert alone(read(short, long)) == alone(read(long, short)) == {"long": 45, "short": 5}


def test_an_operator_that_outlasts_its_caller_leaves_it_no_time_and_not_less(read: Any) -> None:
    assert alone(read(op("outer", 0, 10), op("inner", 2, 30))) == {"inner": 30, "outer": 0}


def test_memory_between_two_called_operators_is_their_callers_and_before_any_operator_nobodys(read: Any) -> None:
    events = [op("outer", 10, 90), op("first", 20, 10), op("second", 60, 10)]
    events += [
        memory(9, 1, 1),
        memory(10, 2, 2),
        memory(25, 4, 4),
        memory(40, 8, 8),
        memory(65, 16, 16),
        memory(101, 32, 32),
    ]
    events += [memory(66, -64, 0), memory(50, 128, 128, tid=9)]
    found = {o.name: (o.allocated_bytes, o.allocations) for o in read(*events).operators_by_memory}
    assert found == {OUTSIDE: (1 + 32 + 128, 3), "outer": (2 + 8, 2), "first": (4, 1), "second": (16, 1)}


def test_fifty_of_each_are_told_the_largest_first(read: Any) -> None:
    names = range(1, 53)
    operators = [op(f"op {n}", 1000 * n, n) for n in names]
    kernels = [op(f"kernel {n}", 1000 * n, n, "kernel") for n in names]
    trace = read(*operators, *kernels, *(memory(1000 * n, 100 - n, 5) for n in names))
    assert [o.name for o in trace.operators_by_time] == [f"op {n}" for n in range(52, 2, -1)]
    assert [o.name for o in trace.operators_by_memory] == [f"op {n}" for n in range(1, 51)]
    assert [k.name for k in trace.kernels] == [f"kernel {n}" for n in range(52, 2, -1)]


# --- what is kept ------------------------------------------------------------------------------------------------------------


def test_a_name_of_200_characters_is_whole_and_a_longer_one_is_cut(read: Any) -> None:
    names = {o.name for o in read(op("a" * 200, 1, 1), op("b" * 201, 3, 1)).operators_by_time}
    assert names == {"a" * 200, "b" * 200}


def test_beyond_the_last_name_everything_new_is_other(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 2)
    trace = read(op("a", 1, 1), op("b", 2, 1), op("c", 3, 1), op("d" * 300, 4, 1), op("a", 5, 1))
    assert {o.name: o.calls for o in trace.operators_by_time} == {"a": 2, "b": 1, "(other)": 2}


def test_a_begin_or_an_end_counts_as_four_events(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 10)
    assert len(read(*(op(f"{i}", i, 1) for i in range(10))).operators_by_time) == 10
    with pytest.raises(InputError, match="over 10 operators and memory events"):
        read(*(op(f"{i}", i, 1) for i in range(11)))
    monkeypatch.setattr(module, "MAX_RECORDS", 8 + 1)
    assert [o.name for o in read(half("B", "a", 1), half("E", "a", 5)).operators_by_time] == ["a"]
    monkeypatch.setattr(module, "MAX_RECORDS", 7)
    with pytest.raises(InputError, match="over 7 operators"):
        read(half("B", "a", 1), half("E", "a", 5))


def test_how_much_is_kept_of_the_largest_trace() -> None:
    collector = module._Collector("t.json")
    for number in range(50_001):
        collector.take(op(f"{number}", 1, 1, "kernel"))
    assert len(collector.kernels) == 50_000
    for number in range(20_001):
        assert collector.spans_full is (number >= 20_000)
        collector.take(op("mine", 1, 1, "user_annotation"))
    assert len(collector.spans) == 20_000
    collector.hours = {hour: [1, 2, 3, 4] for hour in range(5, 10_004)}
    collector.take(op("kept", 20_000 * HOUR, 1))
    collector.take(op("lost", 30_000 * HOUR, 1))
    assert [hour for hour in collector.hours if hour >= 10_004] == [20_000]
    collector.records = 24_000_000 - 1
    collector.take(op("last", 1, 1))
    with pytest.raises(InputError, match="over 24,000,000 operators and memory events"):
        collector.take(op("beyond", 1, 1))


def test_as_many_annotations_as_there_may_be_are_all_kept_but_said_to_be_the_first(
    read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SPANS", 2)
    spans = [op(f"{i}", i, 1, "user_annotation") for i in range(3)]
    assert not any("annotations" in note for note in read(spans[0]).notes)
    assert "only the first 2 annotations are kept" in read(*spans).notes


def test_a_kernel_that_is_known_goes_on_when_no_new_one_is_kept(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 1)
    trace = read(*(op(name, i, 2, "kernel") for i, name in enumerate(("gemm", "other", "gemm"))))
    assert [(k.name, k.calls, round(k.seconds * 1e6)) for k in trace.kernels] == [("gemm", 2, 4)]


@pytest.mark.parametrize(("number", "kept"), [(9.9e17, True), (1e18, False), (-9.9e17, True), (-1e18, False)])
def test_a_time_of_less_than_a_quintillion_microseconds_is_one(number: float, kept: bool, read: Any) -> None:
    trace = read(op("a", number, 1))
    assert [o.name for o in trace.operators_by_time] == (["a"] if kept else [])


def test_events_without_a_category_are_operators_and_counted(read: Any) -> None:
    bare = {"ph": "X", "name": "a", "ts": 1, "dur": 4, "pid": 1, "tid": 1}
    trace = read(bare, bare | {"ts": 9}, {"ph": "M", "name": "process_name"}, bare | {"ph": "i", "name": "mark"})
    assert [(o.name, o.calls) for o in trace.operators_by_time] == [("a", 2)]
    assert "2 events have no category, as torch.profiler writes it; they are taken for operators" in trace.notes


def test_an_event_without_a_phase_counts_if_its_category_is_known(read: Any) -> None:
    event = {key: value for key, value in op("a", 1, 2).items() if key != "ph"}
    assert [o.name for o in read(event).operators_by_time] == ["a"]
    assert read(op("b", 1, 2), event | {"cat": "unheard of"}).operators_by_time[0].name == "b"
    assert len(read(op("b", 1, 2), event | {"cat": "unheard of"}).operators_by_time) == 1


def test_of_what_begins_twice_the_inner_one_ends_first_and_one_that_never_ends_is_said(read: Any) -> None:
    trace = read(half("B", "a", 0), half("B", "a", 10), half("E", "a", 14), half("E", "a", 30), half("B", "b", 40))
    (found,) = trace.operators_by_time
    assert (found.calls, round(found.seconds * 1e6), round(found.self_seconds * 1e6)) == (2, 34, 30)
    assert trace.notes[0] == "1 event did not finish and is left out: event 5, 'b', begins without an end"
    trace = read(half("B", "a", 0), half("B", "lost", 10), half("E", "a", 30))
    assert trace.seconds == pytest.approx(30e-6)
    assert [o.name for o in trace.operators_by_time] == ["a"]
    assert trace.notes[0].endswith("event 2, 'lost', begins without an end")

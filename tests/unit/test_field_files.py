"""Traces and snapshots of the kinds that people have: each of tests/data/field, and neighbours of its kind."""

from __future__ import annotations

import json
import pickle
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_snapshot_reader import CPP, MAIN, OWN, TORCH, entry, segment
from test_snapshot_reader import saved as saved_snapshot
from test_trace_reader import EVENTS, HOST, memory, op, saved

from wanvram.analysis import event_scanner
from wanvram.analysis.snapshot import read_snapshot
from wanvram.analysis.trace import read_trace
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.units import MIB

FIELD = Path(__file__).parents[1] / "data" / "field"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["analyze", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# --- every file ----------------------------------------------------------------------------------------------------------

TRACES = {
    "trace_windows_backslash.json": "1 event is no valid JSON and is left out: event 3 (near byte 436)",
    "trace_unescaped_quotes.json": "1 event is no valid JSON and is left out: event 3 (near byte 436)",
    "trace_memory_without_totals.json": "2 memory events of cuda:0 have no Total Allocated",
    "trace_ts_string.json": None,
    "trace_dur_minus1.json": "1 event did not finish and is left out: event 6, 'aten::unfinished', lasts -1.0 microseconds",
    "trace_BE.json": None,
    "trace_ts_zero.json": "1 event is left out of the time span, over a day away from the rest: event 6 at 0 microseconds",
    "trace_category_Operator.json": None,
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_from_the_field_has_its_peak_and_a_note_on_what_was_left_out(name: str) -> None:
    trace = read_trace(FIELD / name)
    assert trace.main is not None
    assert (trace.main.device, trace.main.peak_allocated_bytes) == ("cuda:0", 9 * MIB)
    assert trace.seconds < 0.001
    taken = {o.name: (o.calls, o.allocated_bytes) for o in trace.operators_by_memory}
    assert (taken["aten::empty"], taken["aten::mul"]) == ((1, MIB), (1, 8 * MIB))
    assert len(taken) == (3 if name == "trace_BE.json" else 2)
    assert trace.kernels[0].calls == 1
    if TRACES[name] is None:
        assert trace.notes == ()
    else:
        assert len(trace.notes) == 1
        assert trace.notes[0].startswith(str(TRACES[name]))


def test_an_event_that_is_no_json_is_left_out_when_16_mib_follow(tmp_path: Path) -> None:
    text = (FIELD / "trace_windows_backslash.json").read_text()
    many = [memory(1757000000000040 + i, 1, 5 * MIB, 6 * MIB, note="x" * 2000) for i in range(9000)]
    path = tmp_path / "t.json"
    path.write_text(text.removesuffix("]}") + ", " + json.dumps(many)[1:-1] + "]}")
    assert path.stat().st_size > 17 * MIB
    trace = read_trace(path)
    assert (trace.events, len(trace.notes)) == (9006, 1)
    assert trace.main is not None
    assert (trace.main.peak_allocated_bytes, trace.main.events) == (9 * MIB, 9002)


def test_a_list_of_the_autograd_profiler_is_named_and_read() -> None:
    trace = read_trace(FIELD / "trace_autograd_profiler.json")
    assert [(o.name, o.calls, round(o.seconds * 1e6)) for o in trace.operators_by_time] == [("aten::mul", 5, 31)]
    assert trace.notes == (
        "this is a list of torch.autograd.profiler, from before torch.profiler: operators and times alone",
    )


def test_a_memory_timeline_is_named_and_what_to_give_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coalesced = tmp_path / "memory_timeline.json"
    coalesced.write_text(json.dumps([[1757000000000000, 1757000000000001], [[0] * 9, [1] * 9]]))
    for path in (FIELD / "memory_timeline.raw.json.gz", coalesced):
        assert main(["analyze", str(path)]) == 2
        message = capsys.readouterr().err
        assert "export_memory_timeline" in message
        assert "export_chrome_trace" in message


def test_a_place_of_allocation_is_one_row_whatever_the_sizes_of_its_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    path = FIELD / "snap_one_line_many_sizes.pickle"
    rows = [line.split() for line in said(capsys, path).splitlines() if "model.py" in line]
    assert rows == [
        ["app/model.py:10", "cache_everything", "30", "1,470.0", "92.5", "%"],
        ["app/model.py:99", "innocent", "2", "120.0", "7.5", "%"],
    ]
    places = json.loads(said(capsys, path, "--json"))["peak"]["by_place"]
    assert [place["bytes"] for place in places] == [1470 * MIB, 120 * MIB]


def test_a_stack_of_the_autograd_thread_is_named_by_its_step() -> None:
    peak = read_snapshot(FIELD / "snap_autograd_thread_cpp_stack.pickle").main.peak
    assert [(g.operation, g.bytes) for g in peak.alive] == [("AddmmBackward0", 12 * MIB), ("MulBackward0", 8 * MIB)]


def test_a_snapshot_without_history_is_said_to_be_a_state_and_no_peak(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, FIELD / "snap_no_history.pickle")
    assert "no history was recorded, so this is the state when the snapshot was taken, not a peak: 8.0 MiB" in text
    assert "_record_memory_history() before the first allocation" in text
    assert "at the peak" not in text
    assert json.loads(said(capsys, FIELD / "snap_no_history.pickle", "--json"))["recorded"] is False


def test_pinned_host_memory_has_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = said(capsys, FIELD / "snap_host_traces.pickle")
    assert "\npinned host memory: 64.0 MiB held at most; at the end 64.0 MiB, 64.0 MiB of it in use.\n" in text
    assert text.startswith("GPU 0: peak 20.0 MiB allocated")
    given_back = [entry("segment_alloc", 0, 64 * MIB), entry("segment_free", 0, 64 * MIB)]
    events = [entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 2 * MIB)]
    path = saved_snapshot(tmp_path / "s.pickle", events, [], host_traces=given_back, host_segments=[])
    assert "pinned host memory: 64.0 MiB held at most; at the end 0.0 MiB" in said(capsys, path)


# --- events that are no JSON -----------------------------------------------------------------------------------------------

BROKEN = {
    "windows path": r'"name": "torch\cuda\__init__.py(219): _lazy_init"',
    "path of a user": r'"name": "C:\users\me"',
    "path that ends in a backslash": r'"name": "C:\temp\"',
    "quotes": '"name": "lib = Library("_ind", "IMPL")"',
    "one quote": '"name": "a 5" screen"',
    "braces in quotes": '"name": "x = {"a": [1]}, {"b": 2}"',
    "no value": '"name": ,',
    "two numbers": '"dur": 1 2',
    "without end": '"name": "abc',
    "no colon": '"name" "abc"',
    "nested": '"name": ' + "[" * 100_000,
}


@pytest.mark.parametrize("place", [0, 3, len(EVENTS)])
@pytest.mark.parametrize("case", BROKEN)
def test_an_event_that_is_no_json_costs_itself_and_its_place_is_named(
    case: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = '{"ph": "X", "cat": "cpu_op", ' + BROKEN[case] + ', "ts": 1015, "dur": 1, "args": {"name": "x"}}'
    texts = [json.dumps(event) for event in EVENTS]
    texts.insert(place, broken)
    path = tmp_path / "t.json"
    path.write_text('{"schemaVersion": 1, "traceEvents": [' + ",\n".join(texts) + '], "traceName": "t"}')
    expected = read_trace(saved(tmp_path / "clean.json", EVENTS))
    at = path.read_text().index(broken)
    for chunk in (event_scanner.CHUNK, 64) if case != "nested" else (event_scanner.CHUNK,):
        monkeypatch.setattr(event_scanner, "CHUNK", chunk)
        trace = read_trace(path)
        assert (trace.memory, trace.steps, trace.seconds) == (expected.memory, expected.steps, expected.seconds)
        (note,) = trace.notes
        assert note.startswith(f"1 event is no valid JSON and is left out: event {place + 1} (near byte {at:,})")


def test_several_broken_events_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    texts = [json.dumps(event) for event in EVENTS]
    for place in (5, 2):
        texts.insert(place, '{"ph": "X", "name": "a\\b\\c"}')
    path = tmp_path / "t.json"
    path.write_text("[" + ",".join(texts) + "]")
    (note,) = read_trace(path).notes
    assert note.startswith("2 events are no valid JSON and are left out: the first, event 3 (near byte ")


def test_what_is_broken_beside_the_events_costs_itself(tmp_path: Path) -> None:
    events = json.dumps(EVENTS)
    path = tmp_path / "t.json"
    expected = read_trace(saved(tmp_path / "clean.json", EVENTS)).memory
    path.write_text(r'{"path": "C:\wheels", "n": 1, "traceEvents": ' + events + "}")
    assert read_trace(path).notes == ("what precedes the list of events is no valid JSON and is left out",)
    assert read_trace(path).memory == expected
    path.write_text('{"traceEvents": ' + events + r', "path": "C:\wheels"}')
    assert read_trace(path).notes == ("what follows the list of events is no valid JSON and is left out",)
    assert read_trace(path).memory == expected


def test_a_file_of_nothing_but_broken_events_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [' + '{"ph": "X", "a\\b"},' * 1000 + "]}")
    with pytest.raises(InputError, match="none of its events can be read; event 1 "):
        read_trace(path)
    monkeypatch.setattr(event_scanner, "MAX_FRUITLESS", 100_000)
    with pytest.raises(InputError, match="is too damaged"):
        read_trace(path)


# --- strange events --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "note"),
    [
        ([op("a", 1, -1)], "1 event did not finish and is left out: event 22, 'a', lasts -1.0 microseconds"),
        ([op("a", 1, 1) | {"dur": "-5.5"}], "'a', lasts -5.5 microseconds"),
        ([{k: v for k, v in op("a", 1, 1).items() if k != "dur"}] * 2, "the first, event 22, 'a', has no duration"),
        ([op("a", 1, 1) | {"ph": "B"}], "event 22, 'a', begins without an end"),
        ([op("a", 1, 1) | {"ph": "E"}], "event 22, 'a', ends without a begin"),
        ([op("a", 1, -1, "kernel")], "event 22, 'a', lasts -1.0 microseconds"),
    ],
)
def test_what_did_not_finish_is_left_out(events: list[Any], note: str, tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path / "t.json", [*EVENTS, *events]))
    assert len(trace.notes) == 1
    assert note in trace.notes[0]
    assert "a" not in {o.name for o in trace.operators_by_time} | {k.name for k in trace.kernels}


def half(phase: str, name: str | None, ts: float, **where: Any) -> dict[str, Any]:
    event = {"ph": phase, "cat": "cpu_op", "ts": ts} | HOST | where
    return event if name is None else event | {"name": name}


def test_begin_and_end_pairs_are_operators_in_any_order_and_by_thread(tmp_path: Path) -> None:
    pairs = [half("B", "outer", 10), half("B", "inner", 20), half("E", None, 30), half("E", "outer", 50)]
    pairs += [half("B", "outer", 12, tid=2), half("E", None, 13, tid=2)]
    pairs += [half("B", "ProfilerStep#1", 5), half("E", "ProfilerStep#1", 60)]
    random.Random(1).shuffle(pairs)
    trace = read_trace(saved(tmp_path / "t.json", pairs))
    times = {o.name: (o.calls, round(o.seconds * 1e6), round(o.self_seconds * 1e6)) for o in trace.operators_by_time}
    assert times == {"outer": (2, 41, 31), "inner": (1, 10, 10)}
    assert [step.name for step in trace.steps] == ["ProfilerStep#1"]


@pytest.mark.parametrize(
    ("category", "where"),
    [
        ("Operator", "operators_by_time"),
        ("operator", "operators_by_time"),
        ("CPU_OP", "operators_by_time"),
        ("cpu_op,user", "operators_by_time"),
        ("Kernel", "kernels"),
        ("Memcpy", "kernels"),
        ("Memset", "kernels"),
        ("gpu_memset", "kernels"),
    ],
)
def test_old_and_other_spellings_of_a_category_are_known(category: str, where: str, tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path / "t.json", [op("a", 1, 2, category)]))
    assert [found.name for found in getattr(trace, where)] == ["a"]


def test_a_number_in_a_string_is_a_number_anywhere(tmp_path: Path) -> None:
    def texts(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key in ("pid", "tid") else texts(item) for key, item in value.items()}
        return str(value) if isinstance(value, (int, float)) else value

    expected, found = (
        read_trace(saved(tmp_path / name, events))
        for name, events in (("a.json", EVENTS), ("b.json", [texts(event) for event in EVENTS]))
    )
    assert (found.memory, found.operators_by_memory, found.kernels, found.notes) == (
        expected.memory,
        expected.operators_by_memory,
        expected.kernels,
        (),
    )


def without_totals(event: dict[str, Any]) -> dict[str, Any]:
    return event | {"args": {k: v for k, v in event["args"].items() if not k.startswith("Total")}}


def test_without_totals_what_is_freed_first_was_there_before(tmp_path: Path) -> None:
    events = [memory(10 * i, change, 0) for i, change in enumerate((-300, 500, -100))]
    trace = read_trace(saved(tmp_path / "t.json", [without_totals(event) for event in events]))
    assert trace.main is not None
    assert [point[1] for point in trace.main.points] == [0, 500, 400]
    assert (trace.main.peak_reserved_bytes, trace.main.fragmentation_mean) == (None, None)


def test_a_total_that_is_missing_goes_on_from_the_last_one(tmp_path: Path) -> None:
    events = [
        memory(0, 100, 700),
        without_totals(memory(10, 50, 0)),
        memory(20, -50, 700),
        without_totals(memory(30, 5, 0)),
    ]
    trace = read_trace(saved(tmp_path / "t.json", events))
    assert trace.main is not None
    assert [point[1] for point in trace.main.points] == [700, 750, 700, 705]
    assert trace.notes[0].startswith("2 memory events of cuda:0 have no Total Allocated")


@pytest.mark.parametrize("ts", [0, -5, 1, 17])
def test_an_event_of_another_age_is_left_out_of_the_time_span(ts: int, tmp_path: Path) -> None:
    start = 1757000000000000
    events = [op("a", start + 10 * i, 5) for i in range(5)] + [memory(start + 3, 100, 100), memory(ts, 900, 900)]
    trace = read_trace(saved(tmp_path / "t.json", [*events, op("k", ts, 0, "kernel")]))
    assert trace.seconds == pytest.approx(45e-6)
    assert trace.main is not None
    assert (trace.main.peak_allocated_bytes, trace.main.events) == (100, 1)
    assert trace.notes == (
        f"2 events are left out of the time span, over a day away from the rest: the first, event 7 at {ts} microseconds",
    )


def test_the_cpu_has_no_reserved_memory_and_no_fragmentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(
        tmp_path / "t.json", [memory(1, 64, 64, 0, device=(0, -1)), op("ProfilerStep#1", 0, 9, "user_annotation")]
    )
    text = said(capsys, path)
    assert "cpu: peak 0.0 MiB allocated at 0.000 s; fluctuation 0.0 MiB.\n" in text
    assert not re.search("reserved|fragmentation", text)


def test_several_ranks_and_devices_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        memory(1, 9, 9 * MIB),
        memory(2, 7, 99 * MIB, device=(1, 3)),
        op("ProfilerStep#1", 0, 5, "user_annotation"),
    ]
    path = saved(tmp_path / "t.json", events, distributedInfo={"backend": "nccl", "rank": 3, "world_size": 8})
    text = said(capsys, path)
    assert text.startswith("t.json: 3 events of rank 3 of 8 in ")
    assert text.index("cuda:3: peak 99.0 MiB") < text.index("cuda:0: peak 9.0 MiB")
    assert "operators by memory allocated (cuda:3)" in text
    traces = [[entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, n * MIB)] for n in (2, 4)]
    path = saved_snapshot(tmp_path / "s.pickle", [], [], device_traces=traces)
    assert "alive at the peak of GPU 1, by where it was allocated" in said(capsys, path)


# --- stacks ----------------------------------------------------------------------------------------------------------------


def cpp(name: str, filename: str = "??", line: int = 0) -> dict[str, Any]:
    return {"filename": filename, "line": line, "name": name}


UNWIND = [cpp("torch::unwind::unwind()"), cpp("torch::CapturedTraceback::gather(bool, bool, bool)")]
MALLOC = [
    cpp("c10::cuda::CUDACachingAllocator::Native::NativeCachingAllocator::malloc(void**, int)"),
    cpp("malloc", "CUDACachingAllocator.cpp"),
]


@pytest.mark.parametrize(
    ("frames", "where"),
    [
        ([cpp("torch::autograd::generated::SoftmaxBackward0::apply(std::vector<at::Tensor>&&)")], "SoftmaxBackward0"),
        ([cpp("torch::autograd::AccumulateGrad::apply(std::vector<at::Tensor>&&)")], "AccumulateGrad"),
        ([cpp("torch::autograd::CopySlices::apply(std::vector<at::Tensor>&&)")], "CopySlices"),
        (
            [cpp("at::_ops::mm::call(at::Tensor const&)"), cpp("torch::autograd::generated::MmBackward0::apply()")],
            "MmBackward0",
        ),
        ([cpp("at::_ops::add_Tensor::call(at::Tensor const&)"), cpp("torch::jit::run()")], "aten::add_Tensor"),
        ([cpp("at::Tensor at::native::addmm<float>(at::Tensor const&)")], "at::native::addmm"),
        ([cpp("c10d::ProcessGroupNCCL::allreduce(std::vector<at::Tensor>&)")], "c10d::ProcessGroupNCCL::allreduce"),
        ([cpp("fused(float*)", "/ext/kernels.cu", 12)], "ext/kernels.cu:12 fused(float*)"),
        (
            [cpp("torch::autograd::Engine::thread_main(std::shared_ptr)"), cpp("clone")],
            "(inside PyTorch, no Python frame)",
        ),
        ([TORCH, OWN, MAIN], "models/dit.py:77 forward"),
        ([CPP, TORCH], "ATen/EmptyTensor.cpp:10 at::empty"),
    ],
)
def test_a_stack_without_own_frames_is_named_by_what_it_does(
    frames: list[dict[str, Any]], where: str, tmp_path: Path
) -> None:
    events = [entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 2 * MIB, 0, *UNWIND, *MALLOC, *frames)]
    (group,) = read_snapshot(saved_snapshot(tmp_path / "s.pickle", events, [])).main.peak.alive
    assert group.operation == where


# --- snapshots with strange values -----------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, 1.5, float("nan"), "5", "x" * 300_000, b"bytes", b"x" * 300_000, [], [1], {}, {"a": 1}, (), ((1, 2), 3),
    {1, 2}, frozenset([3]), bytearray(b"y"), -1, 1 << 70, 1 << 100, 1 << 3000, "\x1b]0;x\x07",
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_no_value_of_any_type_in_an_event_breaks_the_reader(protocol: int, tmp_path: Path) -> None:
    """Each value in each place of one event, among good ones: these keep their peak."""
    if protocol == 2:  # bytes and sets of protocol 2 are calls, which are refused
        values = [value for value in ODD if not isinstance(value, (bytes, bytearray, set, frozenset))]
    else:
        values = [value for value in ODD if protocol == 5 or not isinstance(value, bytearray)]
    good = [entry("segment_alloc", 0, 20 * MIB, 0, OWN), entry("alloc", 0, 4 * MIB, 0, OWN)]
    for key in ("action", "addr", "size", "stream", "time_us", "frames", "compile_context"):
        for value in values:
            events = [dict(event) for event in good]
            strange = entry("segment_alloc", 1 << 40, 2 * MIB, 0, OWN)
            path = saved_snapshot(tmp_path / "s.pickle", [*events, strange], [])
            content = pickle.loads(path.read_bytes())
            content["device_traces"][0][2][key] = value
            path.write_bytes(pickle.dumps(content, protocol))
            found = read_snapshot(path)
            assert found.main.peak_allocated_bytes == 4 * MIB, (key, value)
            assert all("event" in note and len(note) < 300 for note in found.notes)
            if key in ("addr", "size") or (key == "stream" and value != -1):
                assert found.notes[0].startswith(f"GPU 0: 1 event is left out: event 3 has {key} ")


def places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


@pytest.mark.parametrize("index", range(len(ODD)))
def test_no_value_of_any_type_anywhere_in_a_snapshot_breaks_the_reader(
    index: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [entry("segment_alloc", 0, 20 * MIB, 0, TORCH, OWN), entry("alloc", 0, 4 * MIB, 0, CPP, OWN, MAIN)]
    more = {
        "allocator_settings": {"max_split_size": -1, "roundup_power2_divisions": {"1": 0}},
        "external_annotations": [{"stage": "START", "name": "a", "device": 0, "time_us": 5}],
        "host_traces": [entry("segment_alloc", 0, 2 * MIB)],
        "host_segments": [segment(0, [(2 * MIB, "active_allocated")])],
    }
    path = saved_snapshot(
        tmp_path / "s.pickle", events, [segment(0, [(4 * MIB, "active_allocated"), (16 * MIB, "inactive")])], **more
    )
    whole = path.read_bytes()
    for place in places(pickle.loads(whole)):
        content = at = pickle.loads(whole)
        for key in place[:-1]:
            at = at[key]
        if not place:
            content = ODD[index]
        else:
            at[place[-1]] = ODD[index]
        path.write_bytes(pickle.dumps(content, 5))
        code = main(["analyze", str(path)])
        out, err = capsys.readouterr()
        assert code == (0 if place else 2), (place, err)
        assert not re.search(r"Traceback|Error\b|NoneType|unhashable|\bobject\b|\x1b", out + err), (place, out, err)


def test_what_is_no_event_among_the_events_is_counted(tmp_path: Path) -> None:
    good = [entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 4 * MIB)]
    path = saved_snapshot(tmp_path / "s.pickle", good, [])
    content = pickle.loads(path.read_bytes())
    content["device_traces"] = [[*good, {"no": "event"}, 7, None], None, [1, 2]]
    path.write_bytes(pickle.dumps(content))
    found = read_snapshot(path)
    assert found.main.peak_allocated_bytes == 4 * MIB
    assert found.notes == (
        "GPU 0: 3 events are left out: event 1 is no event",
        "GPU 2: 2 events are left out: it holds values that are no events",
    )


def test_a_time_of_another_age_does_not_stretch_the_history(tmp_path: Path) -> None:
    for strange in (0, 2):
        events = [entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 4 * MIB), entry("alloc", 8 * MIB, 2 * MIB)]
        path = saved_snapshot(tmp_path / "s.pickle", events, [])
        content = pickle.loads(path.read_bytes())
        content["device_traces"][0][strange]["time_us"] = 3
        path.write_bytes(pickle.dumps(content))
        main_device = read_snapshot(path).main
        assert main_device.peak_allocated_bytes == 6 * MIB
        assert all(0 <= point[0] < 1 for point in main_device.points)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="int() has no limit of digits before 3.11")
def test_digits_without_end_are_left_out_with_their_event(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [{"ph": "X", "ts": ' + "1" * 5000 + "}," + json.dumps(EVENTS)[1:] + "}")
    (note,) = read_trace(path).notes
    assert "expected a number" in note

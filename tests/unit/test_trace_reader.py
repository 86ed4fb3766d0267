"""Profiler traces: what torch writes is read to the number, in bounded memory, and every bad file gets a sentence."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from wanvram.analysis import event_scanner
from wanvram.analysis import trace as module
from wanvram.analysis.trace import read_trace
from wanvram.analysis.trace_summary import OUTSIDE
from wanvram.errors import InputError

HOST = {"pid": 1, "tid": 1}


def op(name: str, ts: float, dur: float, category: str = "cpu_op", **where: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "args": {"Ev Idx": 1}} | HOST | where


def memory(ts: float, change: int, total: int, reserved: int = 1000, **where: Any) -> dict[str, Any]:
    device = where.pop("device", (1, 0))
    args = {"Total Reserved": reserved, "Total Allocated": total, "Bytes": change, "Addr": 7}
    args |= {"Device Type": device[0], "Device Id": device[1]}
    return {"ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", "ts": ts, "args": args} | HOST | where


def saved(path: Path, events: list[Any], **more: Any) -> Path:
    content = {"schemaVersion": 1, "deviceProperties": [{"id": 0}], "traceEvents": events, "traceName": "t"} | more
    path.write_text(json.dumps(content, indent=1))
    return path


EVENTS = [
    {"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "tid": 0, "args": {"name": "python"}},
    op("ProfilerStep#3", 1000, 100, "user_annotation"),
    op("ProfilerStep#4", 1100, 100, "user_annotation"),
    op("denoise", 1010, 150, "user_annotation"),
    op("ProfilerStep#3", 1000, 100, "gpu_user_annotation", pid=0, tid=7),
    op("aten::linear", 1010, 40),
    op("aten::mm", 1020, 20),
    op("aten::add", 1060, 10),
    op("aten::mm", 1120, 20),
    op("aten::mm", 1021, 20, tid=2),
    op("gemm", 1030, 70, "kernel", pid=0, tid=7),
    op("gemm", 1130, 30, "kernel", pid=0, tid=7),
    op("Memcpy HtoD", 1140, 5, "gpu_memcpy", pid=0, tid=7),
    memory(1012, 100, 100, 400),
    memory(1025, 300, 400, 400),
    memory(1045, 50, 450, 800),
    memory(1055, 7, 457, 800),
    memory(1061, -357, 100, 800),
    memory(1125, 600, 700, 1000),
    memory(1190, -600, 100, 1000),
    memory(1030, 64, 64, 0, device=(0, -1)),
]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return saved(tmp_path / "trace.json", EVENTS)


def test_memory_over_time_has_its_peaks_and_when_they_were(small: Path) -> None:
    trace = read_trace(small)
    assert [curve.device for curve in trace.memory] == ["cuda:0", "cpu"]
    curve = trace.main
    assert curve is not None
    assert (curve.peak_allocated_bytes, curve.peak_reserved_bytes, curve.reserved_at_peak_bytes) == (700, 1000, 1000)
    assert (curve.peak_seconds, curve.peak_reserved_seconds) == (pytest.approx(125e-6), pytest.approx(125e-6))
    assert curve.fluctuation_bytes == 600
    assert [point[1:] for point in curve.points] == [
        (100, 400), (400, 400), (450, 800), (457, 800), (100, 800), (700, 1000), (100, 1000),
    ]  # fmt: skip
    assert (trace.events, trace.notes) == (len(EVENTS), ())
    assert trace.seconds == pytest.approx(200e-6)


def test_fragmentation_is_given_at_the_peak_at_its_worst_and_on_average(small: Path) -> None:
    curve = read_trace(small).main
    assert curve is not None
    assert curve.fragmentation_at_peak == pytest.approx(0.3)
    assert curve.fragmentation_max == pytest.approx(0.9)
    free = [(13, 0.75), (20, 0.0), (10, 350 / 800), (6, 343 / 800), (64, 0.875), (65, 0.3)]
    assert curve.fragmentation_mean == pytest.approx(sum(us * part for us, part in free) / 178)


def test_memory_belongs_to_the_innermost_operator_of_its_thread(small: Path) -> None:
    found = {o.name: (o.allocated_bytes, o.allocations, o.calls) for o in read_trace(small).operators_by_memory}
    assert found == {
        "aten::mm": (900, 2, 3),
        "aten::linear": (150, 2, 1),
        OUTSIDE: (7, 1, 0),
        "aten::add": (0, 0, 1),
    }


def test_operators_and_kernels_are_ranked_by_time(small: Path) -> None:
    trace = read_trace(small)
    times = [(o.name, round(o.seconds * 1e6), round(o.self_seconds * 1e6)) for o in trace.operators_by_time]
    assert times == [("aten::mm", 60, 60), ("aten::linear", 40, 20), ("aten::add", 10, 10), (OUTSIDE, 0, 0)]
    assert [(k.name, k.calls, round(k.seconds * 1e6)) for k in trace.kernels] == [
        ("gemm", 2, 100),
        ("Memcpy HtoD", 1, 5),
    ]


def test_steps_and_annotations_have_the_peak_inside_them(small: Path) -> None:
    trace = read_trace(small)
    steps = [(s.name, s.peak_allocated_bytes, s.peak_reserved_bytes) for s in trace.steps]
    assert steps == [("ProfilerStep#3", 457, 800), ("ProfilerStep#4", 700, 1000)]
    (denoise,) = trace.annotations
    assert (denoise.name, denoise.peak_allocated_bytes) == ("denoise", 700)
    assert (denoise.start, denoise.end) == (pytest.approx(10e-6), pytest.approx(160e-6))


def test_the_order_of_events_in_the_file_does_not_matter(small: Path, tmp_path: Path) -> None:
    shuffled = list(EVENTS)
    random.Random(3).shuffle(shuffled)
    expected, found = read_trace(small), read_trace(saved(tmp_path / "shuffled.json", shuffled))
    assert found.memory == expected.memory
    assert found.steps == expected.steps
    by_name = [{o.name: o for o in trace.operators_by_memory} for trace in (found, expected)]
    assert by_name[0] == by_name[1]


def test_memory_that_stood_before_a_step_counts_in_it(tmp_path: Path) -> None:
    events = [memory(10, 500, 500), op("ProfilerStep#1", 20, 5, "user_annotation"), memory(30, 100, 600)]
    (step,) = read_trace(saved(tmp_path / "t.json", events)).steps
    assert step.peak_allocated_bytes == 500


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace written by this machine's torch: three steps of two matrix products on the CPU."""
    path = tmp_path_factory.mktemp("real") / "trace.json"
    x = torch.ones(64, 128)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        acc_events=True,
    ) as profiler:
        for _ in range(4):
            with torch.profiler.record_function("both products"):
                y = torch.mm(x, x.T)
                z = torch.mm(x.T, x)
                del y, z
            profiler.step()
    return path


def test_a_trace_of_this_torch_is_read(real: Path) -> None:
    trace = read_trace(real)
    events = json.loads(real.read_text())["traceEvents"]
    totals = [e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"]
    assert trace.events == len(events)
    assert trace.main is not None
    assert (trace.main.device, trace.main.events) == ("cpu", len(totals))
    assert trace.main.peak_allocated_bytes == max(totals) >= 64 * 64 * 4 + 128 * 128 * 4
    product = next(o for o in trace.operators_by_memory if o.name == "aten::mm")
    assert (product.calls, product.allocated_bytes) == (6, 3 * 4 * (64 * 64 + 128 * 128))
    assert [step.name for step in trace.steps] == ["ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"]
    assert all(step.peak_allocated_bytes == max(totals) for step in trace.steps)
    assert [span.name for span in trace.annotations] == ["both products"] * 3


def test_a_gzipped_trace_and_a_bare_list_are_the_same_trace(small: Path, tmp_path: Path) -> None:
    expected = read_trace(small)
    packed, bare = tmp_path / "t.json.gz", tmp_path / "bare.json"
    packed.write_bytes(gzip.compress(small.read_bytes(), mtime=0))
    bare.write_text(json.dumps(EVENTS))
    for path in (packed, bare):
        found = read_trace(path)
        assert (found.memory, found.operators_by_memory, found.notes) == (
            expected.memory,
            expected.operators_by_memory,
            (),
        )


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_where_a_chunk_ends_does_not_matter(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = saved(tmp_path / "t.json", [*EVENTS, op('grün é ∂ 🎬 \\ " \n', 1300, 1)], number=12345, truth=True)
    expected = read_trace(named)
    monkeypatch.setattr(event_scanner, "CHUNK", chunk)
    found = read_trace(named)
    assert (found.memory, found.operators_by_time, found.steps) == (
        expected.memory,
        expected.operators_by_time,
        expected.steps,
    )
    assert any(o.name == 'grün é ∂ 🎬 \\ " \n' for o in found.operators_by_time)


def test_a_long_trace_becomes_four_thousand_points_that_keep_the_peak(tmp_path: Path) -> None:
    rng = random.Random(1)
    totals = [rng.randrange(1000) for _ in range(30_000)]
    totals[12_345] = 5000
    events = [memory(10 * i, 1, total, 9000 + (i == 20_000)) for i, total in enumerate(totals)]
    curve = read_trace(saved(tmp_path / "t.json", events)).main
    assert curve is not None
    assert 1000 < len(curve.points) <= 4000
    assert max(curve.points, key=lambda p: p[1])[:2] == (pytest.approx(0.12345), 5000)
    assert max(point[2] for point in curve.points) == 9001
    assert [p[0] for p in curve.points] == sorted(p[0] for p in curve.points)


def test_a_trace_without_memory_events_says_how_to_record_them(tmp_path: Path) -> None:
    trace = read_trace(
        saved(tmp_path / "t.json", [op("aten::mm", 1, 2), op("ProfilerStep#1", 0, 9, "user_annotation")])
    )
    assert trace.main is None
    assert trace.notes == ("no memory events: record the trace with torch.profiler.profile(profile_memory=True)",)
    assert trace.steps[0].peak_allocated_bytes is None
    assert trace.operators_by_time[0].name == "aten::mm"


# --- files that are not what they should be --------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_trace_that_breaks_off_keeps_what_was_readable_and_says_so(packed: bool, tmp_path: Path) -> None:
    events = [memory(i, 1, i) for i in range(3000)]
    whole = saved(tmp_path / "t.json", events).read_bytes()
    cut = tmp_path / ("cut.json.gz" if packed else "cut.json")
    cut.write_bytes(gzip.compress(whole, mtime=0)[:-900] if packed else whole[: len(whole) // 2])
    trace = read_trace(cut)
    assert 100 < trace.events < 3000
    assert trace.main is not None
    assert trace.main.peak_allocated_bytes == trace.events - 1
    assert trace.notes == (f"the file breaks off after {trace.events:,} events; what follows them is missing",)


def test_every_length_of_a_broken_trace_is_read_or_named(small: Path, tmp_path: Path) -> None:
    whole, cut, read = small.read_bytes(), tmp_path / "cut.json", 0
    for end in range(1, len(whole) - 20, 37):
        cut.write_bytes(whole[:end])
        try:
            trace = read_trace(cut)
        except InputError:
            assert end < 400, "the first event is complete by then"
            continue
        read += 1
        assert "breaks off after" in trace.notes[0]
    assert read > 50


def test_a_damaged_trace_is_read_or_named_and_never_crashes(small: Path, tmp_path: Path) -> None:
    whole, path, rng, named = small.read_bytes(), tmp_path / "t.json", random.Random(2), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_trace(path)
        except InputError:
            named += 1
    assert named < 100, "one damaged byte costs one event"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"\x80\x04}.", "is no torch.profiler trace: it begins with"),
        (b"hello", "it begins with 'h'"),
        (b"{}", "no list of traceEvents"),
        (b'{"a": 1, "traceEvents": 5}', "no list of traceEvents"),
        (b'{"a": 1', "breaks off or is damaged before its first event"),
        (b"{5: 1}", "not valid JSON: expected a key"),
        (b'{"traceEvents": [1, 2]}', "event 1 is '1'"),
        (b'{"traceEvents": [' + b"[" * 200_000, "nested too deeply"),
        (b'{"other": ' + b'{"a":' * 200_000, "nested too deeply"),
        (b'{"traceEvents": [' + b"1" * 5000 + b"]}", "expected a number"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:12], "breaks off or is damaged before its first event"),
        (b"\x1f\x8bnot gzip at all", "breaks off or is damaged before its first event"),
    ],
)
def test_a_file_that_is_no_trace_gets_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (op("a", float("nan"), 1), "has ts nan; expected a number"),
        (op("a", 1, float("inf")), "has dur inf; expected a number"),
        (op("a", 10**400, 1), "has ts a number of over 40 digits; expected a number"),
        (op("a", "five", 1), "has ts 'five'; expected a number"),  # type: ignore[arg-type]
        (op("a", True, 1), "has ts true; expected a number"),
        (op("a", None, 1), "has ts null; expected a number"),  # type: ignore[arg-type]
        (op("a", {"a": 1}, 1), "has ts a section of 1; expected a number"),  # type: ignore[arg-type]
        (op("a", 1, 1e17), "lasts 100000000000000000 microseconds"),
        (memory(1, 5, -5), "has Total Allocated -5; expected a whole number that is not negative"),
        (memory(1, 5, 5, -1), "has Total Reserved -1; expected a whole number that is not negative"),
        (
            memory(1, 5, 1 << 70),
            "has Total Allocated 1180591620717411303424; expected a whole number that is not negative",
        ),
        (memory(1, 5, 1.5), "has Total Allocated 1.5; expected a whole number that is not negative"),  # type: ignore[arg-type]
        (memory(1, 5, 5) | {"args": None}, ", a [memory] event, has no args"),
        (memory(1, 5, 5) | {"args": {"Device Type": 1}}, ", a [memory] event, has neither Bytes nor Total Allocated"),
        ("text", "is 'text'"),
        ([1], "is '[1]'"),
    ],
)
def test_a_value_that_cannot_be_costs_its_event_which_a_note_names(event: Any, sentence: str, tmp_path: Path) -> None:
    clean, trace = (
        read_trace(saved(tmp_path / "c.json", EVENTS)),
        read_trace(saved(tmp_path / "t.json", [*EVENTS, event])),
    )
    assert (trace.memory, trace.operators_by_memory, trace.seconds) == (
        clean.memory,
        clean.operators_by_memory,
        clean.seconds,
    )
    gap = "" if sentence.startswith(",") else " "
    assert trace.notes == (f"1 event is left out: event {len(EVENTS) + 1}{gap}{sentence}",)
    only = saved(tmp_path / "only.json", [event, event])
    if isinstance(event, dict):
        alone = read_trace(only)
        assert alone.notes[0] == f"2 events are left out: the first, event 1{gap}{sentence}"
        assert (alone.memory, alone.operators_by_time, alone.seconds) == ((), (), 0)
        return
    with pytest.raises(InputError, match="none of its events can be read; event 1"):
        read_trace(only)


def test_what_is_kept_of_a_trace_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CHUNK": 4096, "MAX_VALUE": 20_000}.items():
        monkeypatch.setattr(event_scanner, name, value)
    for name, value in {"MAX_RECORDS": 100, "MAX_NAMES": 10, "MAX_SPANS": 10}.items():
        monkeypatch.setattr(module, name, value)
    with pytest.raises(InputError, match="over 100 operators and memory events; record fewer steps"):
        read_trace(saved(tmp_path / "t.json", [op("a", i, 1) for i in range(101)]))
    large = read_trace(saved(tmp_path / "t.json", [op("a" * 50_000, 1, 1), op("b", 1, 1)]))
    assert "expected a value of under 16 MiB" in large.notes[0]
    assert [o.name for o in large.operators_by_time] == ["b"]
    many = [op(f"{i}" + "x" * 300, i, 1, kind) for i in range(50) for kind in ("cpu_op", "kernel", "user_annotation")]
    trace = read_trace(saved(tmp_path / "t.json", many))
    assert sum(o.calls for o in trace.operators_by_time) == 50
    assert max(len(o.name) for o in trace.operators_by_time) == 200
    assert (len(trace.operators_by_time), len(trace.kernels), len(trace.annotations)) == (11, 10, 10)
    assert "only the first 10 annotations are kept" in trace.notes


def test_a_missing_trace_and_a_folder_get_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_trace(path)


def test_a_trace_that_begins_with_a_byte_order_mark_is_read(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "marked.json"
    path.write_bytes(b"\xef\xbb\xbf" + small.read_bytes())
    assert read_trace(path).events == read_trace(small).events


@pytest.mark.parametrize("content", ["[]", '{"traceEvents": []}'])
def test_a_trace_without_any_event_is_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text(content)
    with pytest.raises(InputError, match="holds no events: nothing was recorded"):
        read_trace(path)


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "1e999", "-1e999", "NaN"])
def test_a_number_without_end_in_a_trace_is_read_or_named(number: str, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    found = list(re.finditer(r"(?<=[:\s])[0-9]+(\.[0-9]+)?(?=[,}\s])", text := small.read_text()))
    assert found
    for place in found:
        path.write_text(text[: place.start()] + number + text[place.end() :])
        with suppress(InputError):
            read_trace(path)


def test_the_reader_needs_no_torch() -> None:
    code = "import sys, wanvram.analysis.trace; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0

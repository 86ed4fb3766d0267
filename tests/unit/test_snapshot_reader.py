"""Snapshots of the CUDA allocator: real histories to the byte, nothing executed, and a sentence for every bad file."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import pickletools
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from wanvram.analysis import pickles
from wanvram.analysis.snapshot import read_snapshot, snapshot_timeline
from wanvram.errors import InputError
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.timeline_record import read_timeline
from wanvram.units import MIB

GOLDEN = Path(os.environ.get("WANVRAM_GOLDEN", Path(__file__).parent.parent / "golden"))
HISTORIES = sorted(GOLDEN.glob("allocator_*.json.gz"))
START_US = 1_763_984_000_000_000

TORCH = {"filename": "/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py", "line": 125, "name": "forward"}
CPP = {"filename": "/pytorch/aten/src/ATen/EmptyTensor.cpp", "line": 10, "name": "at::empty"}
OWN = {"filename": "/work/src/models/dit.py", "line": 77, "name": "forward"}
MAIN = {"filename": "/work/run.py", "line": 3, "name": "<module>"}


def entry(action: str, addr: int, size: int, stream: int = 0, *frames: dict[str, Any]) -> dict[str, Any]:
    """As torch/csrc/cuda/Module.cpp (2.11) builds it; the times are set by `saved`."""
    key = "device_free" if action == "oom" else "addr"
    return {
        "action": action, key: addr, "size": size, "stream": stream, "time_us": 0,
        "compile_context": "N/A", "user_metadata": "", "frames": list(frames),
    }  # fmt: skip


def segment(address: int, blocks: list[tuple[int, str]], **changes: Any) -> dict[str, Any]:
    total = sum(size for size, _ in blocks)
    starts = itertools.accumulate((size for size, _ in blocks), initial=address)
    return {
        "device": 0, "address": address, "total_size": total, "allocated_size": 0, "active_size": 0, "stream": 0,
        "segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False, "frames": [],
        "blocks": [
            {"address": at, "size": size, "requested_size": size, "state": state, "frames": [OWN]}
            for at, (size, state) in zip(starts, blocks, strict=False)
        ],
    } | changes  # fmt: skip


def saved(path: Path, events: list[dict[str, Any]], segments: list[dict[str, Any]], **more: Any) -> Path:
    """A snapshot as torch.cuda.memory._dump_snapshot writes it; one event every 10 microseconds. `protocol` for pickle."""
    for index, event in enumerate(events):
        event["time_us"] = START_US + 10 * index
    protocol = more.pop("protocol", 4)
    content = {"segments": segments, "device_traces": [events], "allocator_settings": {}, "external_annotations": []}
    path.write_bytes(pickle.dumps(content | more, protocol=protocol))
    return path


def final_segments(history: list[list[Any]], *, expandable: bool) -> list[dict[str, Any]]:
    """The segments at the end of a history, with the blocks as the allocator's model has them."""
    model = CachingAllocator(AllocatorSettings(expandable_segments=expandable))
    handles: dict[int, int] = {}
    places: dict[int, int] = {}  # the model's address -> the real one
    for (action, address, size, stream), previous in zip(history, [None, *history], strict=False):
        if action == "alloc":
            handles[address] = model.malloc(size, stream)
            places[handles[address]] = address
        elif action == "free_completed":
            model.free(handles.pop(address))
        elif action in ("segment_free", "segment_unmap") and (previous is None or previous[0] != action):
            model.empty_cache()
    blocks = [(places[a], size) for view in model.segments() for a, size, state in view.blocks if state == "allocated"]
    unused = model.reserved_bytes - sum(size for _, size in blocks)
    live = [segment(address, [(size, "active_allocated")]) for address, size in blocks]
    return [*live, segment(1 << 50, [(unused, "inactive")])]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.name.split(".")[0])
def test_a_real_history_gives_the_drivers_own_counters(path: Path, protocol: int, tmp_path: Path) -> None:
    case = json.loads(gzip.decompress(path.read_bytes()))
    history = case["events"]
    events = [entry(action, address, size, stream, OWN, MAIN) for action, address, size, stream in history]
    file = saved(
        tmp_path / "s.pickle",
        events,
        final_segments(history, expandable=case["expandable_segments"]),
        protocol=protocol,
    )
    snapshot = read_snapshot(file)
    found = snapshot.main
    assert found.peak_allocated_bytes == case["peak_allocated_bytes"]
    assert found.peak_reserved_bytes == case["peak_reserved_bytes"]
    assert (found.allocated_bytes, found.reserved_bytes) == (case["allocated_bytes"], case["reserved_bytes"])
    assert (found.complete, found.events, snapshot.notes) == (True, len(history), ())
    peak = found.peak
    assert sum(group.bytes for group in peak.alive) == peak.allocated_bytes
    assert sum(s.size for s in peak.segments) == peak.reserved_bytes
    assert sum(hole.bytes for hole in peak.holes) == peak.reserved_bytes - peak.allocated_bytes
    assert {group.operation for group in peak.alive} == {"models/dit.py:77 forward"}
    assert len(found.points) <= 4000
    assert max(point[1] for point in found.points) == case["peak_allocated_bytes"]


def test_who_is_alive_at_the_peak_is_named_by_the_innermost_frame_outside_of_torch(tmp_path: Path) -> None:
    events = [entry("segment_alloc", 0, 40 * MIB)]
    events += [entry("alloc", i * 2 * MIB, 2 * MIB, 0, CPP, TORCH, OWN, MAIN) for i in range(3)]
    events += [entry("alloc", 6 * MIB, 5 * MIB, 0, CPP, TORCH, MAIN), entry("alloc", 11 * MIB, 3 * MIB, 0, CPP, TORCH)]
    events += [
        entry("alloc", 14 * MIB, 2 * MIB),
        entry("free_requested", 0, 2 * MIB),
        entry("free_completed", 0, 2 * MIB),
    ]
    peak = read_snapshot(saved(tmp_path / "s.pickle", events, [])).main.peak
    assert [(g.bytes, g.count, g.operation) for g in peak.alive] == [
        (6 * MIB, 3, "models/dit.py:77 forward"),
        (5 * MIB, 1, "work/run.py:3 <module>"),
        (3 * MIB, 1, "ATen/EmptyTensor.cpp:10 at::empty"),
        (2 * MIB, 1, "(no stack recorded)"),
    ]
    assert peak.seconds == pytest.approx(60e-6)


def test_blocks_that_wait_for_another_stream_are_free_for_torch_but_hold_memory(tmp_path: Path) -> None:
    a, b = 0, 12 * MIB
    events = [entry("segment_alloc", 0, 24 * MIB), entry("alloc", a, 12 * MIB), entry("free_requested", a, 12 * MIB)]
    events += [entry("alloc", b, 12 * MIB), entry("alloc", 1 << 40, 3 * MIB), entry("free_completed", a, 12 * MIB)]
    events.insert(4, entry("segment_alloc", 1 << 40, 20 * MIB, 7))
    found = read_snapshot(saved(tmp_path / "s.pickle", events, [])).main
    assert (found.peak_allocated_bytes, found.peak_active_bytes) == (15 * MIB, 27 * MIB)
    assert [(hole.bytes, hole.segment, hole.offset, hole.why) for hole in found.peak.holes] == [
        (17 * MIB, 1 << 40, 3 * MIB, "belongs to stream 7"),
        (12 * MIB, 0, 0, "freed, but another stream may still use it"),
    ]


def test_holes_say_why_the_memory_is_of_no_use(tmp_path: Path) -> None:
    blocks = {
        0: [(4 * MIB, "active_allocated"), (6 * MIB, "inactive"), (10 * MIB, "active_allocated")],
        1 << 30: [(MIB, "active_allocated"), (MIB, "inactive")],
        1 << 31: [(20 * MIB, "inactive")],
    }
    segments = [segment(at, b, segment_type="small" if at == 1 << 30 else "large") for at, b in blocks.items()]
    events = [entry("segment_alloc", at, sum(size for size, _ in b)) for at, b in blocks.items()]
    events += [entry("alloc", 0, 4 * MIB), entry("alloc", 4 * MIB, 6 * MIB), entry("alloc", 10 * MIB, 10 * MIB)]
    events += [entry("free_requested", 4 * MIB, 6 * MIB), entry("free_completed", 4 * MIB, 6 * MIB)]
    events += [entry("alloc", 1 << 30, MIB), entry("alloc", 1 << 32, 7 * MIB)]
    events.insert(3, entry("segment_alloc", 1 << 32, 20 * MIB))
    segments.append(segment(1 << 32, [(7 * MIB, "active_allocated"), (13 * MIB, "inactive")]))
    snapshot = read_snapshot(saved(tmp_path / "s.pickle", events, segments))
    assert snapshot.notes == ()
    assert [(hole.bytes, hole.why) for hole in snapshot.main.peak.holes] == [
        (20 * MIB, "a whole free segment; torch.cuda.empty_cache() would give it back"),
        (13 * MIB, "beside live blocks: fits only requests up to 13.0 MiB"),
        (6 * MIB, "beside live blocks: fits only requests up to 6.0 MiB"),
        (MIB, "in the small pool, which serves requests up to 1 MiB only"),
    ]


def test_a_rest_of_up_to_one_mebibyte_belongs_to_the_block(tmp_path: Path) -> None:
    events = [entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 19 * MIB + 1)]
    peak = read_snapshot(saved(tmp_path / "s.pickle", events, [])).main.peak
    assert peak.allocated_bytes == 20 * MIB


@pytest.mark.parametrize(
    ("settings", "block"),
    [
        ({"max_split_size": -1, "roundup_power2_divisions": {"1": 0, "2": 0}}, 66 * MIB),
        ({"max_split_size": 64 * MIB}, 80 * MIB),
        ({"roundup_power2_divisions": {str(1 << i): 4 if i > 4 else 0 for i in range(16)}}, 80 * MIB),
        ({"roundup_power2_divisions": {str(1 << i): 16 for i in range(16)}}, 68 * MIB),
    ],
)
def test_settings_written_behind_the_events_decide_the_size_of_blocks(
    settings: dict[str, Any], block: int, tmp_path: Path
) -> None:
    events = [entry("segment_alloc", 0, 80 * MIB), entry("alloc", 0, 66 * MIB)]
    snapshot = read_snapshot(saved(tmp_path / "s.pickle", events, [], allocator_settings=settings))
    assert snapshot.main.peak_allocated_bytes == block


@pytest.mark.parametrize("dropped", [1, 2, 40, 4000])
def test_a_history_that_starts_late_is_completed_from_the_segments_and_says_so(dropped: int, tmp_path: Path) -> None:
    case = json.loads(gzip.decompress(HISTORIES[0].read_bytes()))
    history = case["events"]
    events = [entry(*event, OWN) for event in history[dropped:]]
    segments = final_segments(history, expandable=False)
    snapshot = read_snapshot(saved(tmp_path / "s.pickle", events, segments))
    found = snapshot.main
    assert not found.complete
    assert len(snapshot.notes) == 1
    assert "exact only when recording starts before" in snapshot.notes[0]
    assert (found.allocated_bytes, found.reserved_bytes) == (case["allocated_bytes"], case["reserved_bytes"])
    assert sum(group.bytes for group in found.peak.alive) == found.peak_allocated_bytes
    assert found.peak_allocated_bytes == pytest.approx(case["peak_allocated_bytes"], rel=0.01)


def test_a_snapshot_without_history_gives_what_was_alive_when_it_was_taken(tmp_path: Path) -> None:
    segments = [segment(0, [(4 * MIB, "active_allocated"), (16 * MIB, "inactive")])]
    found = read_snapshot(saved(tmp_path / "s.pickle", [], segments)).main
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes, found.events) == (4 * MIB, 20 * MIB, 0)
    assert [group.operation for group in found.peak.alive] == ["models/dit.py:77 forward"]
    assert len(snapshot_timeline(read_snapshot(tmp_path / "s.pickle")).points) == 1


def test_each_device_has_its_own_history(tmp_path: Path) -> None:
    traces = [[entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, (2 + i) * MIB)] for i in range(3)]
    traces[1] = []
    path = saved(tmp_path / "s.pickle", [], [], device_traces=traces)
    snapshot = read_snapshot(path)
    assert [(d.device, d.peak_allocated_bytes) for d in snapshot.devices] == [(0, 2 * MIB), (2, 4 * MIB)]
    assert snapshot.main.device == 2


def test_out_of_memory_and_annotations_are_reported(tmp_path: Path) -> None:
    events = [entry("segment_alloc", 0, 20 * MIB), entry("alloc", 0, 2 * MIB), entry("oom", 123, 1 << 40)]
    marks = [("START", "denoise", 0), ("START", "step 0", 5), ("END", "step 0", 15), ("END", "denoise", 25)]
    annotations = [{"stage": s, "name": n, "device": 0, "time_us": START_US + at} for s, n, at in marks]
    snapshot = read_snapshot(saved(tmp_path / "s.pickle", events, [], external_annotations=annotations))
    (refusal,) = snapshot.main.out_of_memory
    assert (refusal.requested_bytes, refusal.free_bytes, refusal.seconds) == (1 << 40, 123, pytest.approx(20e-6))
    timeline = snapshot_timeline(snapshot).to_json()
    assert timeline["stages"] == [
        {"name": "denoise", "component": None, "kind": "stage", "start": 0.0, "end": pytest.approx(25e-6)},
        {
            "name": "step 0",
            "component": None,
            "kind": "step",
            "start": pytest.approx(5e-6),
            "end": pytest.approx(15e-6),
        },
    ]
    assert timeline["moments"][0]["stage"] == "denoise"


def test_the_timeline_has_one_moment_whose_parts_add_up(tmp_path: Path) -> None:
    events = [entry("segment_alloc", 0, 1200 * MIB)]
    events += [entry("alloc", 4 * i * MIB, 2 * MIB + 512 * i) for i in range(260)]
    timeline = json.loads(
        json.dumps(snapshot_timeline(read_snapshot(saved(tmp_path / "s.pickle", events, []))).to_json())
    )
    assert (timeline["schema"], timeline["axis"], timeline["weights"]) == (1, "seconds", [])
    (moment,) = timeline["moments"]
    assert len(moment["alive"]) == 200
    assert moment["alive"][-1]["operation"] == "(other)"
    assert sum(group["bytes"] for group in moment["alive"]) == moment["allocated_bytes"]
    assert sum(group["count"] for group in moment["alive"]) == 260
    (drawn,) = moment["segments"]
    assert sum(size for _, size, state in drawn["blocks"] if state == "active") == moment["allocated_bytes"]
    assert sum(size for _, size, _ in drawn["blocks"]) == drawn["bytes"] == moment["reserved_bytes"]
    assert timeline["points"][-1][1:] == [moment["allocated_bytes"], 1200 * MIB, None]
    read_timeline(timeline)


def test_27_thousand_events_become_four_thousand_points_that_keep_the_peak(tmp_path: Path) -> None:
    rng = random.Random(5)
    sizes = [rng.randrange(2, 9) * MIB for _ in range(9000)]
    sizes[7001] = 50 * MIB
    events = [entry("segment_alloc", 0, 60 * MIB)]
    for size in sizes:
        events += [entry(action, 0, size) for action in ("alloc", "free_requested", "free_completed")]
    found = read_snapshot(saved(tmp_path / "s.pickle", events, [])).main
    assert 1000 < len(found.points) <= 4000
    assert max(found.points, key=lambda p: p[1]) == (pytest.approx((1 + 3 * 7001) * 10e-6), 50 * MIB, 60 * MIB)
    assert [p[0] for p in found.points] == sorted(p[0] for p in found.points)


# --- files that are not what they should be --------------------------------------------------------------------------------


class _Attack:
    def __init__(self, reduced: tuple[Any, ...]) -> None:
        self._reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    attack = {"segments": [_Attack((os.mkdir, (str(trace),)))], "device_traces": []}
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(attack, protocol=protocol))
    with pytest.raises(InputError, match=r"refused: its pickle opcode (STACK_)?GLOBAL would import or run code"):
        read_snapshot(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists(), "the attack is real: the standard library executes it"


def test_only_opcodes_of_plain_data_are_understood(tmp_path: Path) -> None:
    """Whatever follows them, the others end in a sentence; these are all that exist."""
    understood = set("hjKJM(]}ueasNXG.qrt)") | {
        "\x8a",
        "\x94",
        "\x8c",
        "\x95",
        "\x80",
        "\x85",
        "\x86",
        "\x87",
        "\x88",
        "\x89",
        *"CB\x8e\x96\x8b\x8d\x8f\x90\x91",  # bytes, sets, long numbers and texts, which are passed over
    }
    path = tmp_path / "s.pickle"
    for opcode in pickletools.opcodes:
        if opcode.code not in understood:
            path.write_bytes(b"\x80\x04}(" + opcode.code.encode("latin-1") + b"cos\nsystem\n" * 3)
            with pytest.raises(InputError, match=r"refused: its pickle opcode|not a pickle of plain data"):
                read_snapshot(path)


def _small(tmp_path: Path) -> bytes:
    events = [entry("segment_alloc", 0, 20 * MIB, 0, OWN)]
    events += [entry("alloc", i * 2 * MIB, 2 * MIB, 0, TORCH, OWN, MAIN) for i in range(4)]
    return saved(tmp_path / "s.pickle", events, [segment(0, [(20 * MIB, "inactive")])]).read_bytes()


def test_a_truncated_snapshot_is_named_wherever_it_ends(tmp_path: Path) -> None:
    whole, path = _small(tmp_path), tmp_path / "s.pickle"
    for end in range(1, len(whole), 3):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"s\.pickle is (truncated or )?damaged"):
            read_snapshot(path)


def test_a_damaged_snapshot_is_read_or_named_and_never_crashes(tmp_path: Path) -> None:
    whole, path, rng, named = _small(tmp_path), tmp_path / "s.pickle", random.Random(1), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            snapshot_timeline(read_snapshot(path))
        except InputError:
            named += 1
    assert 100 < named < 400


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b'{"traceEvents": []}', "not a pickle of plain data"),
        (pickle.dumps({"a": 1}), "neither segments nor device_traces"),
        (pickle.dumps([1, 2]), "no CUDA allocator snapshot"),
        (pickle.dumps({"segments": 5}), "no CUDA allocator snapshot"),
        (pickle.dumps({"segments": [], "device_traces": []}), "nothing was allocated"),
        (gzip.compress(pickle.dumps({"segments": []}), mtime=0)[:-9], "truncated or damaged"),
        (b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "no CUDA allocator snapshot"),
        (b"\x80\x04" + b")" + b"\x85" * 100_000 + b".", "no CUDA allocator snapshot"),
        (b"\x80\x04X\xff\xff\xff\x7f", "truncated or damaged"),
        (b"\x80\x04\x8b\xff\xff\xff\xff", "a value of less than no bytes"),
        (b"\x80\x04](K\x01K\x02\x8a\x01\x01eu.", "truncated or damaged"),
        (b"\x80\x04]r\xff\xff\xff\x7f.", "memo place 2147483647"),
        (pickle.dumps({"device_traces": [[entry("alloc", 0, -5)]]}), "damaged"),
        (pickle.dumps({"device_traces": [[entry("alloc", 0, 5) | {"size": "5"}]]}), "damaged"),
        (pickle.dumps({"device_traces": [[entry("alloc", 0, 5) | {"size": float("nan")}]]}), "damaged"),
    ],
)
def test_a_file_that_is_no_snapshot_gets_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        read_snapshot(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_snapshot_and_a_folder_get_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pickle", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_snapshot(path)


@pytest.mark.parametrize("content", [b"]\x94" * 40_000, b"K\x01" * 40_000, b"](" + b"K\x01" * 9000 + b"e"])
def test_what_is_kept_outside_of_events_is_bounded(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CHUNK": 4096, "MARGIN": 1024, "MAX_STACK": 8000, "MAX_KEPT": 2000, "MAX_MEMO": 8000}.items():
        monkeypatch.setattr(pickles, name, value)
    path = tmp_path / "s.pickle"
    path.write_bytes(b"\x80\x04" + content + b".")
    with pytest.raises(InputError, match="outside of any event"):
        read_snapshot(path)


def test_events_leave_nothing_behind_but_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file passes when the reader may keep only 500 values: 6,000 events and their stacks are folded at once."""
    events = [entry("segment_alloc", 0, 20 * MIB)]
    for i in range(2000):
        frames = [TORCH, OWN | {"line": i % 50}, MAIN]
        events += [entry(a, 0, 2 * MIB, 0, *frames) for a in ("alloc", "free_requested", "free_completed")]
    path = saved(tmp_path / "s.pickle", events, [])
    for name, value in {"CHUNK": 4096, "MARGIN": 1024, "MAX_STACK": 9000, "MAX_KEPT": 500}.items():
        monkeypatch.setattr(pickles, name, value)
    assert read_snapshot(path).main.events == 6001


@pytest.mark.parametrize("what", ["frames", "refusals", "alive", "traces"])
def test_what_a_replay_holds_counts_toward_the_limit(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = {
        "frames": [[entry("snapshot", 0, 0, 0, OWN | {"line": i}) for i in range(400)]],
        "refusals": [[entry("oom", 0, MIB) for _ in range(1200)]],
        "alive": [[entry("alloc", i * MIB, 512) for i in range(1200)]],
        "traces": [[entry("snapshot", 0, 0)] for _ in range(200)],
    }
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": traces[what]}))
    read_snapshot(path)
    monkeypatch.setattr(pickles, "MAX_KEPT", 1000)
    with pytest.raises(InputError, match="outside of any event"):
        read_snapshot(path)


def test_a_gzipped_snapshot_and_one_of_bare_segments_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(gzip.compress(_small(tmp_path), mtime=0))
    assert read_snapshot(path).main.peak_allocated_bytes == 8 * MIB
    path.write_bytes(pickle.dumps([segment(0, [(4 * MIB, "active_allocated")])]))  # torch before 2.0
    assert read_snapshot(path).main.peak_allocated_bytes == 4 * MIB


def test_the_readers_need_no_torch() -> None:
    code = "import sys, wanvram.analysis.snapshot, wanvram.report.memory_viz; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0

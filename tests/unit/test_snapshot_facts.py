"""Facts about allocator snapshots at their edges: the size of a block, what joins what, what is a hole, and what was there before."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from unit.test_snapshot_reader import OWN, START_US, entry, saved, segment
from wanvram.analysis.replay import Frame, Replay, Rules, Segment, Stack
from wanvram.analysis.snapshot import DeviceHistory, HostMemory, Snapshot, find_holes, read_snapshot, snapshot_timeline
from wanvram.errors import InputError
from wanvram.units import GIB, KIB, MIB


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def snapshot(*events: Any, segments: Any = (), **more: Any) -> Snapshot:
        return read_snapshot(saved(tmp_path / "s.pickle", list(events), list(segments), **more))

    return snapshot


def held(size: int, at: int = 0, stream: int = 0) -> dict[str, Any]:
    return entry("segment_alloc", at, size, stream)


def block(at: int, size: int) -> dict[str, Any]:
    return entry("alloc", at, size, 0, OWN)


def freed(at: int, size: int) -> list[dict[str, Any]]:
    return [entry("free_requested", at, size), entry("free_completed", at, size)]


def peak(snapshot: Snapshot) -> int:
    return snapshot.main.peak_allocated_bytes


# --- the size of a block -----------------------------------------------------------------------------------------------------


def test_a_block_is_a_whole_number_of_512_bytes_and_nothing_is_one_of_them() -> None:
    assert [Rules().rounded(size) for size in (0, 1, 512, 513, 1024)] == [512, 512, 512, 1024, 1024]


def test_a_rest_of_one_mebibyte_belongs_to_the_block_and_a_larger_one_is_a_hole(read: Any) -> None:
    assert peak(read(held(20 * MIB), block(0, 19 * MIB))) == 20 * MIB
    assert peak(read(held(20 * MIB), block(0, 19 * MIB - 512))) == 19 * MIB - 512


def test_a_block_of_one_mebibyte_is_small_and_leaves_its_rest(read: Any) -> None:
    assert peak(read(held(2 * MIB), block(0, MIB))) == MIB
    assert peak(read(held(2 * MIB), block(0, MIB + 512))) == 2 * MIB


def test_a_block_ends_where_the_next_one_begins(read: Any) -> None:
    full = [held(20 * MIB), block(0, 10 * MIB), block(10 * MIB, 10 * MIB)]
    again = [*full, *freed(0, 10 * MIB), block(0, 9 * MIB + 512)]
    assert read(*again).main.allocated_bytes == 20 * MIB
    both = [*full, *freed(0, 10 * MIB), *freed(10 * MIB, 10 * MIB), block(0, 19 * MIB)]
    assert read(*both).main.allocated_bytes == 20 * MIB, "nothing is in the way any more"


def test_a_block_outside_of_every_segment_that_is_known_is_as_large_as_was_asked(read: Any) -> None:
    assert peak(read(held(20 * MIB, 1 << 30), block(0, 19 * MIB))) == 19 * MIB
    assert peak(read(held(20 * MIB), block(30 * MIB, 19 * MIB))) == 19 * MIB


def test_pages_are_mapped_for_a_block_to_the_last_512_bytes(read: Any) -> None:
    assert peak(read(entry("segment_map", 0, 20 * MIB), block(0, 19 * MIB + 512))) == 19 * MIB + 512


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"max_split_size": 0}, 66 * MIB),
        ({"max_split_size": 66 * MIB}, 128 * MIB),
        ({"max_split_size": 66 * MIB + 512}, 66 * MIB),
        ({"max_split_size": 1 << 62}, 66 * MIB),
        ({"max_split_size": "64"}, 66 * MIB),
        ({"roundup_power2_divisions": {str(1 << i): 1 for i in range(16)}}, 66 * MIB),
        ({"roundup_power2_divisions": {str(1 << i): 4 if i == 6 else 0 for i in range(16)}}, 80 * MIB),
        ({"roundup_power2_divisions": {str(1 << i): 4 if i == 5 else 0 for i in range(16)}}, 66 * MIB),
        ({"roundup_power2_divisions": {"1": 1 << 40}}, 66 * MIB),
        ({"roundup_power2_divisions": {"1": 4, "2": -1}}, 66 * MIB),
        ({"roundup_power2_divisions": {"1": 4}}, 80 * MIB),
    ],
)
def test_what_is_a_setting_decides_and_what_is_none_does_not(settings: dict[str, Any], size: int, read: Any) -> None:
    assert peak(read(held(128 * MIB), block(0, 66 * MIB), allocator_settings=settings)) == size


def test_each_power_of_two_has_its_own_part_and_what_is_beyond_them_the_last() -> None:
    rules = Rules(divisions=(2, 4, 8))
    assert rules.rounded(1025 * KIB) == 1536 * KIB, "half of a mebibyte"
    assert rules.rounded(2049 * KIB) == 2560 * KIB, "a quarter of two"
    assert rules.rounded(5 * MIB) == 5 * MIB
    assert rules.rounded(4 * MIB + 1) == 4 * MIB + 512 * KIB, "an eighth of four"
    assert rules.rounded(64 * MIB + 1) == 72 * MIB
    assert rules.rounded(3 * KIB + 1) == 4 * KIB, "the first for all below a mebibyte"
    assert rules.rounded(1025) == 1536, "at least 512 bytes"
    assert rules.rounded(600) == 1024
    assert Rules(divisions=(16,)).rounded(8192) == 8192
    assert Rules(divisions=(16,)).rounded(8193) == 8704


# --- events ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "last", "beyond"),
    [
        ("size", 0, -1),
        ("size", (1 << 62) - 1, 1 << 62),
        ("addr", 0, -1),
        ("addr", (1 << 64) - 1, 1 << 64),
        ("time_us", 0, -1),
        ("time_us", (1 << 62) - 1, 1 << 62),
        ("stream", -1 << 63, (-1 << 63) - 1),
        ("stream", (1 << 64) - 1, 1 << 64),
    ],
)
def test_the_last_value_that_an_allocator_gives_is_kept_and_the_next_one_left_out(
    key: str, last: int, beyond: int
) -> None:
    def fed(value: int) -> Replay:
        replay = Replay(Rules())
        event = {"action": "snapshot", "addr": 1, "size": 1, "stream": 1, "time_us": 1, "stack": Stack()} | {key: value}
        replay.feed([tuple(event.values())])
        return replay

    assert (fed(last).events, fed(last).strange) == (1, 0)
    assert (fed(beyond).events, fed(beyond).strange) == (0, 1)
    assert fed(beyond).first_strange.startswith(f"event 1 has {key} ")


def test_the_first_event_that_cannot_be_is_named_by_its_place_in_the_trace(read: Any) -> None:
    good = [held(20 * MIB), block(0, 2 * MIB)]
    snapshot = read(*good, block(8 * MIB, -5), block(9 * MIB, -6))
    assert snapshot.notes == ("GPU 0: 2 events are left out: event 3 has size -5",)
    assert read(*good, entry("alloc", 8 * MIB, -5)).notes == ("GPU 0: 1 event is left out: event 3 has size -5",)


def test_of_two_equal_peaks_the_first_is_told(read: Any) -> None:
    found = read(held(20 * MIB), block(0, 4 * MIB), *freed(0, 4 * MIB), block(8 * MIB, 4 * MIB)).main
    assert found.peak.seconds == pytest.approx(10e-6)
    assert [hole.offset for hole in found.peak.holes] == [4 * MIB], "the block at its beginning was alive"


def test_what_was_freed_since_the_peak_was_alive_at_it(read: Any) -> None:
    later = [*freed(0, 4 * MIB), block(0, 3 * MIB), *freed(0, 3 * MIB), *freed(8 * MIB, 2 * MIB)]
    found = read(held(20 * MIB), block(0, 4 * MIB), block(8 * MIB, 2 * MIB), *later).main
    assert [(group.bytes, group.count) for group in found.peak.alive] == [(4 * MIB, 1), (2 * MIB, 1)]
    assert (found.allocated_bytes, found.complete) == (0, True)


def test_an_allocation_where_a_block_stands_ends_that_one(read: Any) -> None:
    found = read(held(20 * MIB), block(0, 4 * MIB), block(0, 6 * MIB)).main
    assert (found.peak_allocated_bytes, found.peak_active_bytes, found.allocated_bytes) == (6 * MIB, 6 * MIB, 6 * MIB)
    waiting = [held(20 * MIB), block(0, 4 * MIB), entry("free_requested", 0, 4 * MIB), block(0, 6 * MIB)]
    assert read(*waiting).main.peak_active_bytes == 6 * MIB


def test_what_is_freed_without_an_allocation_was_there_before_the_recording(read: Any) -> None:
    snapshot = read(held(20 * MIB), block(0, 4 * MIB), *freed(8 * MIB, 3 * MIB - 100), segments=[])
    found = snapshot.main
    assert (found.peak_allocated_bytes, found.allocated_bytes, found.complete) == (7 * MIB, 4 * MIB, False)
    assert [(point[1]) for point in found.points][:2] == [3 * MIB, 7 * MIB]
    assert {group.operation: group.bytes for group in found.peak.alive}["(before the recording)"] == 3 * MIB
    assert snapshot.notes[0].startswith("GPU 0: the history starts after 3.0 MiB had been allocated;")


def test_segments_and_events_that_do_not_end_alike_are_said(read: Any) -> None:
    events = [held(20 * MIB), block(0, 4 * MIB)]
    empty = [segment(0, [(20 * MIB, "inactive")])]
    assert read(*events, segments=empty).notes == (
        "GPU 0: the events end with 4.0 MiB allocated, the segments say 0.0 MiB",
    )
    assert read(*events, segments=[segment(0, [(4 * MIB, "active_allocated"), (16 * MIB, "inactive")])]).notes == ()


def test_what_was_reserved_before_the_recording_counts_in_every_figure(read: Any) -> None:
    older = segment(1 << 40, [(8 * MIB, "active_allocated"), (12 * MIB, "inactive")])
    own = segment(0, [(4 * MIB, "active_allocated"), (16 * MIB, "inactive")])
    found = read(held(20 * MIB), block(0, 4 * MIB), segments=[own, older]).main
    assert (found.peak_reserved_bytes, found.reserved_bytes, found.peak.reserved_bytes) == (40 * MIB,) * 3
    assert (found.peak_allocated_bytes, found.peak_active_bytes) == (12 * MIB, 12 * MIB)
    assert found.points[-1][1:] == (12 * MIB, 40 * MIB)
    assert (found.peak.segments, found.peak.holes, found.complete) == ((), (), False)


def test_thirty_one_days_without_an_event_are_believed_and_more_are_a_clock_that_was_set() -> None:
    def last(gap: float) -> float:
        replay, start = Replay(Rules()), 10**15
        times = [start, start + 5, start + int(gap * 86_400e6)]
        replay.feed(("snapshot", 0, 0, 0, time_us, Stack()) for time_us in times)
        return replay.last

    assert last(31) == pytest.approx(31 * 86_400)
    assert last(31.001) == 5e-6


def test_a_first_event_whose_clock_was_not_set_is_at_the_beginning_like_the_second() -> None:
    replay = Replay(Rules())
    replay.feed(("snapshot", 0, 0, 0, time_us, Stack()) for time_us in (3, 10**15, 10**15 + 5))
    assert [point[0] for point in replay.points.result()] == [0.0, 0.0, 5e-6]


def test_a_history_without_an_allocation_has_figures_of_nothing(read: Any) -> None:
    found = read(held(20 * MIB)).main
    assert (found.peak_allocated_bytes, found.peak_active_bytes, found.allocated_bytes) == (0, 0, 0)
    assert (found.peak.seconds, found.peak.alive, found.complete) == (0.0, (), True)
    empty = read(segments=[segment(0, [(MIB, "inactive")])]).main
    assert (empty.points, empty.peak_active_bytes) == (((0.0, 0, MIB),), 0)


# --- segments ----------------------------------------------------------------------------------------------------------------


def mapped(at: int, size: int, stream: int = 0) -> dict[str, Any]:
    return entry("segment_map", at * MIB, size * MIB, stream)


def ranges(read: Any, *events: dict[str, Any]) -> list[tuple[int, int]]:
    """Address and size in MiB of what is reserved at the peak, which comes last."""
    found = read(*events, block(1 << 40, MIB)).main.peak.segments
    return [(s.address // MIB, s.size // MIB) for s in found]


def test_mapped_pages_that_touch_are_one_segment(read: Any) -> None:
    assert ranges(read, mapped(0, 20), mapped(20, 20)) == [(0, 40)]
    assert ranges(read, mapped(20, 20), mapped(0, 20)) == [(0, 40)]
    assert ranges(read, mapped(0, 20), mapped(40, 20), mapped(20, 20)) == [(0, 60)]
    assert ranges(read, mapped(0, 20), mapped(22, 20)) == [(0, 20), (22, 20)]


def test_pages_of_another_stream_or_size_and_whole_segments_join_nothing(read: Any) -> None:
    assert ranges(read, mapped(0, 20), mapped(20, 20, 7)) == [(0, 20), (20, 20)]
    assert ranges(read, mapped(0, 20), mapped(20, 2)) == [(0, 20), (20, 2)]
    assert ranges(read, held(20 * MIB), mapped(20, 20)) == [(0, 20), (20, 20)]
    assert ranges(read, held(20 * MIB), held(20 * MIB, 20 * MIB)) == [(0, 20), (20, 20)]


def test_unmapping_the_middle_leaves_both_ends(read: Any) -> None:
    def left(at: int, size: int) -> list[tuple[int, int]]:
        return ranges(read, mapped(0, 60), entry("segment_unmap", at * MIB, size * MIB))

    assert left(20, 20) == [(0, 20), (40, 20)]
    assert left(0, 20) == [(20, 40)]
    assert left(40, 20) == [(0, 40)]
    assert left(0, 60) == []
    assert left(40, 40) == [(0, 60)], "which was never mapped"
    assert left(80, 20) == [(0, 60)]
    events = [mapped(0, 60), *(entry("segment_unmap", at * MIB, 10 * MIB) for at in (20, 50, 0))]
    assert ranges(read, *events) == [(10, 10), (30, 20)], "what is left can be unmapped, too"


def test_what_a_freed_segment_reserved_is_given_back_and_the_peak_keeps_it(read: Any) -> None:
    found = read(held(20 * MIB), block(0, 4 * MIB), *freed(0, 4 * MIB), entry("segment_free", 0, 20 * MIB)).main
    assert (found.peak_reserved_bytes, found.reserved_bytes, found.points[-1][2]) == (20 * MIB, 0, 0)
    assert [s.size for s in found.peak.segments] == [20 * MIB]


def test_segments_of_two_mebibytes_are_the_small_ones(read: Any) -> None:
    found = read(held(2 * MIB), block(0, 512 * KIB), held(4 * MIB, 1 << 30), block(1 << 30, 1100 * KIB)).main
    assert [segment.small for segment in found.peak.segments] == [True, False]


def test_blocks_that_cannot_be_are_counted_and_one_is_shown(read: Any) -> None:
    def note(*sizes: int) -> str:
        given = segment(0, [(size, "active_allocated") for size in (MIB, *sizes)], total_size=20 * MIB)
        return read(held(20 * MIB), block(0, MIB), segments=[given]).notes[0]

    assert note(-5) == "1 block is left out, for instance one with size -5"
    assert note(-5, -6) == "2 blocks are left out, for instance one with size -5"


# --- holes -------------------------------------------------------------------------------------------------------------------


def hole_reasons(*segments: dict[str, Any], tmp_path: Path) -> list[tuple[int, int, str]]:
    found = read_snapshot(saved(tmp_path / "s.pickle", [], list(segments))).main.peak.holes
    return [(hole.bytes // MIB, hole.offset // MIB, hole.reason) for hole in found]


def test_the_main_stream_is_the_one_that_holds_most(tmp_path: Path) -> None:
    used = [(2 * MIB, "active_allocated"), (6 * MIB, "inactive")]
    large = segment(1 << 30, [(2 * MIB, "active_allocated"), (7 * MIB, "inactive")], stream=5)
    assert hole_reasons(segment(0, used), large, tmp_path=tmp_path) == [
        (7, 2, "beside live blocks"),
        (6, 2, "belongs to stream 0"),
    ]


def test_a_segment_with_a_block_that_waits_is_no_free_segment(tmp_path: Path) -> None:
    waiting = segment(0, [(2 * MIB, "active_pending_free"), (18 * MIB, "inactive")])
    assert hole_reasons(waiting, tmp_path=tmp_path) == [
        (18, 2, "beside live blocks"),
        (2, 0, "freed, but another stream may still use it"),
    ]


def test_without_segments_there_are_no_holes() -> None:
    assert find_holes([]) == ()
    assert find_holes([Segment(0, MIB, 0, False, False, ())]) == ()


# --- several devices, stages, and the host -----------------------------------------------------------------------------------


def test_segments_of_a_device_that_recorded_nothing_are_its_state(read: Any) -> None:
    other = segment(1 << 30, [(9 * MIB, "active_allocated"), (MIB, "inactive")], device=1)
    snapshot = read(held(20 * MIB), block(0, 4 * MIB), segments=[other])
    assert [(d.device, d.recorded, d.peak_allocated_bytes) for d in snapshot.devices] == [
        (0, True, 4 * MIB),
        (1, False, 9 * MIB),
    ]
    assert snapshot.main.device == 1


def marks(*given: tuple[str, str, int]) -> list[dict[str, Any]]:
    return [{"stage": s, "name": n, "device": 0, "time_us": START_US + at} for s, n, at in given]


def staged(read: Any, *given: tuple[str, str, int]) -> DeviceHistory:
    events = [held(20 * MIB), block(0, 2 * MIB), block(8 * MIB, 2 * MIB), *freed(0, 2 * MIB)]
    return read(*events, external_annotations=marks(*given)).main


def test_a_stage_has_its_depth_and_ends_with_the_recording_if_nobody_ended_it(read: Any) -> None:
    found = staged(read, ("START", "a", -50), ("START", "b", 5), ("END", "c", 6), ("END", "b", 10), ("START", "d", 20))
    assert [(name, depth, round(start * 1e6), round(end * 1e6)) for name, depth, start, end in found.stages] == [
        ("a", 0, 0, 40),
        ("b", 1, 5, 10),
        ("d", 1, 20, 40),
    ]
    late = staged(read, ("START", "late", 100))
    assert [(round(start * 1e6), round(end * 1e6)) for *_, start, end in late.stages] == [(100, 100)]


def test_the_peak_is_in_the_last_stage_that_it_touches(read: Any) -> None:
    def stage(*given: tuple[str, str, int]) -> str | None:
        events = [held(20 * MIB), block(0, 2 * MIB), block(8 * MIB, 2 * MIB)]  # the peak is at 20
        return snapshot_timeline(read(*events, external_annotations=marks(*given))).moments[0].stage

    assert stage(("START", "a", 0), ("END", "a", 20), ("START", "b", 20), ("END", "b", 30)) == "b"
    assert stage(("START", "a", 0), ("END", "a", 20)) == "a"
    assert stage(("START", "a", 0), ("END", "a", 19)) is None
    assert stage(("START", "a", 21), ("END", "a", 30)) is None
    assert stage(("START", "a", 0), ("START", "b", 10), ("END", "b", 30), ("END", "a", 40)) == "a", "the outermost"


@pytest.mark.parametrize(("count", "kinds"), [(1000, {"stage", "step"}), (1001, {"stage"})])
def test_of_up_to_a_thousand_stages_two_levels_are_drawn_and_of_more_only_one(
    count: int, kinds: set[str], read: Any
) -> None:
    inside = [("START", "b", 1), ("START", "c", 2), ("END", "c", 3), ("END", "b", 4)]
    more = [(what, "s", 10 + i) for i in range(count - 3) for what in ("START", "END")]
    drawn = snapshot_timeline(
        read(
            held(20 * MIB),
            block(0, MIB),
            external_annotations=marks(("START", "a", 0), *inside, ("END", "a", 5), *more),
        )
    )
    assert {stage.kind for stage in drawn.stages} == kinds
    assert [stage.name for stage in drawn.stages if stage.name in "abc"] == ["a", "b"][: len(kinds)]


def host(read: Any, **more: Any) -> HostMemory | None:
    return read(held(20 * MIB), block(0, 2 * MIB), **more).host


def test_pinned_memory_from_before_the_recording_counts_at_its_peak(read: Any) -> None:
    used = segment(0, [(10 * MIB, "active_allocated"), (22 * MIB, "inactive")])
    events = [held(64 * MIB), entry("segment_free", 0, 64 * MIB), held(8 * MIB, 1 << 30)]
    assert host(read, host_segments=[used], host_traces=events) == HostMemory(88 * MIB, 32 * MIB, 10 * MIB)
    assert host(read, host_segments=[used], host_traces=[]) == HostMemory(32 * MIB, 32 * MIB, 10 * MIB)
    assert host(read, host_segments=[], host_traces=[held(8 * MIB), block(0, MIB)]) == HostMemory(8 * MIB, 8 * MIB, MIB)
    assert host(read, host_segments=[segment(0, [(MIB, "inactive")])], host_traces=[held(8 * MIB)]) == HostMemory(
        8 * MIB, MIB, 0
    )


def test_without_pinned_memory_nothing_is_said_of_it(read: Any) -> None:
    assert host(read) is None
    assert host(read, host_segments=[], host_traces=[]) is None
    assert host(read, host_segments=5, host_traces=5) is None


def test_a_file_of_nothing_but_pinned_memory_says_so(read: Any) -> None:
    with pytest.raises(InputError, match=r"on any GPU; its 2\.00 GiB are pinned host memory"):
        read(host_segments=[segment(0, [(2 * GIB, "active_allocated")])])


def test_a_list_with_one_segment_among_other_things_is_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps([5, segment(0, [(4 * MIB, "active_allocated")])]))
    assert peak(read_snapshot(path)) == 4 * MIB


def test_a_place_is_a_file_with_its_folder_or_a_name_alone() -> None:
    assert Frame("C:\\work\\models\\dit.py", 7, "forward").where == "models/dit.py:7 forward"
    assert Frame("dit.py", 7, "forward").where == "dit.py:7 forward"
    assert Frame("a/b/c/dit.py", 0, "forward").where == "c/dit.py:0 forward"
    assert Frame("a/b/c/dit.py", 7, "").where == "c/dit.py:7 "
    assert Frame("a/b/dit.Block", 0, "").where == "a/b/dit.Block"

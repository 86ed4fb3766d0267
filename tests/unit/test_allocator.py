"""The caching-allocator model: real H200 histories to the byte, each rule alone, and random histories that lose no byte."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanvram.errors import OutOfMemory
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.units import MIB

GOLDEN = Path(os.environ.get("WANVRAM_GOLDEN", Path(__file__).parent.parent / "golden"))
HISTORIES = sorted(GOLDEN.glob("allocator_*.json.gz"))
COUNTERS = ("peak_allocated_bytes", "peak_reserved_bytes", "allocated_bytes", "reserved_bytes")
RELEASES, GROWTHS = ("segment_free", "segment_unmap"), ("segment_alloc", "segment_map")

DEFAULT = AllocatorSettings()
EXPANDABLE = AllocatorSettings(expandable_segments=True)
ALL_SETTINGS = (DEFAULT, EXPANDABLE)


# --- recorded histories ----------------------------------------------------------------------------------------------------


def segment_size(size: int) -> int:
    """What a request adds to reserved memory when nothing cached fits: what the cap is compared with."""
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def is_retry(events: list[list[Any]], index: int, reserved: int, limit: int) -> bool:
    """Whether the releases from `index` on belong to an allocation that hit the limit: the model does those by itself."""
    while events[index][0] in RELEASES:
        index += 1
        if index == len(events):
            return False
    grows = events[index][0] in GROWTHS
    request = next((event for event in events[index:] if event[0] == "alloc"), None)
    return grows and request is not None and reserved + segment_size(request[2]) > limit


def replay(case: dict[str, Any]) -> tuple[CachingAllocator, list[tuple[str, int, int]]]:
    """Feeds alloc, free_completed and an empty_cache where segments are given back; -> the model and its segment events."""
    seen: list[tuple[str, int, int]] = []
    model = CachingAllocator(
        AllocatorSettings(expandable_segments=case["expandable_segments"]),
        total_bytes=case["total_bytes"],
        limit_bytes=case["limit_bytes"],
        on_segment=lambda event, address, size, stream: seen.append((event, size, stream)),
    )
    limit = min(value for value in (case["total_bytes"], case["limit_bytes"], 1 << 62) if value is not None)
    handles: dict[int, int] = {}
    previous = ""
    events = case["events"]
    for index, (action, address, size, stream) in enumerate(events):
        if action == "alloc":
            handles[address] = model.malloc(size, stream)
        elif action == "free_completed":
            model.free(handles.pop(address))
        elif (
            action in RELEASES and previous not in RELEASES and not is_retry(events, index, model.reserved_bytes, limit)
        ):
            model.empty_cache()
        previous = action
    return model, seen


def test_the_golden_directory_has_histories() -> None:
    assert HISTORIES


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.name.partition(".")[0])
def test_a_recorded_history_is_reproduced(path: Path) -> None:
    case = json.loads(gzip.decompress(path.read_bytes()))
    model, seen = replay(case)
    counters = {name: getattr(model, name) for name in COUNTERS}
    expected = {name: case[name] for name in COUNTERS}
    if case["exact"]:
        assert counters == expected
        assert seen == [(e[0], e[2], e[3]) for e in case["events"] if e[0].startswith("segment_")]
        assert case["ooms"] > 0 or model.alloc_retries == case["alloc_retries"]
    else:
        assert counters == pytest.approx(expected, rel=0.002)


# --- rounding, pools, segments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (8_519_680, 8_519_680, 20 * MIB),  # cuBLAS's workspace before sm_90
        (33_554_432, 33_554_432, 32 * MIB),  # and on sm_90
    ],
)
def test_a_first_request_is_rounded_and_opens_a_segment_of_its_class(size: int, allocated: int, reserved: int) -> None:
    model = CachingAllocator()
    model.malloc(size)
    assert (model.allocated_bytes, model.reserved_bytes, len(model.segments())) == (allocated, reserved, 1)


def test_a_tail_of_at_most_one_mebibyte_is_not_split_off_and_counts_as_allocated() -> None:
    model = CachingAllocator()
    model.malloc(31 * MIB)
    assert model.allocated_bytes == 32 * MIB


def test_a_tail_of_more_than_one_mebibyte_is_split_off() -> None:
    model = CachingAllocator()
    model.malloc(31 * MIB - 512)
    assert model.allocated_bytes == 31 * MIB - 512


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    model = CachingAllocator()
    handles = [model.malloc(MIB), model.malloc(MIB - 512)]
    assert model.malloc(512) == handles[1] + MIB - 512
    assert (model.allocated_bytes, model.reserved_bytes) == (2 * MIB, 2 * MIB)


def test_small_and_large_requests_never_share_a_segment() -> None:
    model = CachingAllocator()
    model.malloc(2 * MIB)
    model.malloc(512)
    assert [view.small for view in model.segments()].count(True) == 1
    assert model.reserved_bytes == 22 * MIB


def test_streams_never_share_cached_memory() -> None:
    model = CachingAllocator()
    model.free(model.malloc(10 * MIB, stream=0))
    model.malloc(10 * MIB, stream=1)
    assert model.reserved_bytes == 20 * MIB
    assert {view.stream for view in model.segments()} == {0, 1}


def test_the_smallest_block_that_fits_is_taken() -> None:
    model = CachingAllocator()
    large, small = model.malloc(40 * MIB), model.malloc(20 * MIB)
    model.free(large)
    model.free(small)
    assert model.malloc(15 * MIB) == small


def test_of_equal_blocks_the_lowest_address_is_taken() -> None:
    model = CachingAllocator()
    handles = [model.malloc(12 * MIB) for _ in range(3)]
    for handle in handles:
        model.free(handle)
    assert [model.malloc(12 * MIB) for _ in range(3)] == sorted(handles)


def test_neighbours_merge_whatever_the_order_of_frees() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        model = CachingAllocator()
        handles = [model.malloc(4 * MIB) for _ in range(3)]
        for index in order:
            model.free(handles[index])
        (view,) = model.segments()
        assert view.blocks == ((handles[0], 20 * MIB, "free"),)


def test_peaks_stay_until_reset() -> None:
    model = CachingAllocator()
    model.free(model.malloc(40 * MIB))
    model.empty_cache()
    assert (model.peak_allocated_bytes, model.peak_reserved_bytes) == (40 * MIB, 40 * MIB)
    model.reset_peaks()
    assert (model.peak_allocated_bytes, model.peak_reserved_bytes) == (0, 0)


def test_empty_cache_gives_large_segments_back_before_small_ones() -> None:
    freed: list[int] = []
    model = CachingAllocator(on_segment=lambda event, address, size, stream: freed.append(size))
    for handle in [model.malloc(512), model.malloc(40 * MIB), model.malloc(30 * MIB)]:
        model.free(handle)
    freed.clear()
    model.empty_cache()
    assert freed == [30 * MIB, 40 * MIB, 2 * MIB]


def test_empty_cache_keeps_a_segment_with_one_live_block() -> None:
    model = CachingAllocator()
    first = model.malloc(4 * MIB)
    model.malloc(4 * MIB)
    model.free(first)
    model.free(model.malloc(30 * MIB))
    model.empty_cache()
    assert model.reserved_bytes == 20 * MIB


# --- expandable segments ---------------------------------------------------------------------------------------------------


def test_an_expandable_segment_grows_by_what_its_free_tail_lacks() -> None:
    model = CachingAllocator(EXPANDABLE)
    first = model.malloc(28 * MIB)
    assert model.reserved_bytes == 40 * MIB
    assert model.malloc(30 * MIB) == first + 28 * MIB  # 12 MiB of tail and one page of 20 MiB
    assert (model.reserved_bytes, len(model.segments())) == (60 * MIB, 1)


def test_an_expandable_segment_splits_large_blocks_down_to_512_bytes() -> None:
    model = CachingAllocator(EXPANDABLE)
    model.malloc(20 * MIB - 512)
    assert model.allocated_bytes == 20 * MIB - 512


def test_a_hole_is_preferred_to_the_growable_end_of_an_expandable_segment() -> None:
    model = CachingAllocator(EXPANDABLE)
    hole, _, tail = model.malloc(16 * MIB), model.malloc(10 * MIB), model.malloc(14 * MIB)
    model.free(hole)
    model.free(tail)  # 14 MiB, the better fit, but it can grow
    assert model.malloc(12 * MIB) == hole


def test_of_equal_holes_in_an_expandable_segment_the_lowest_is_taken() -> None:
    model = CachingAllocator(EXPANDABLE)
    handles = [model.malloc(4 * MIB) for _ in range(5)]
    model.free(handles[3])
    model.free(handles[1])
    assert model.malloc(4 * MIB) == handles[1]


def test_empty_cache_unmaps_only_whole_pages_inside_a_free_block() -> None:
    model = CachingAllocator(EXPANDABLE)
    first = model.malloc(5 * MIB)
    middle = model.malloc(70 * MIB)
    model.malloc(5 * MIB)  # 80 MiB mapped, the free range is 5 to 75 MiB
    model.free(middle)
    model.empty_cache()
    (view,) = model.segments()
    assert model.reserved_bytes == view.size == 40 * MIB
    assert [(address - first, size, state) for address, size, state in view.blocks[:5]] == [
        (0, 5 * MIB, "allocated"),
        (5 * MIB, 15 * MIB, "free"),
        (20 * MIB, 40 * MIB, "unmapped"),
        (60 * MIB, 15 * MIB, "free"),
        (75 * MIB, 5 * MIB, "allocated"),
    ]


def test_unmapped_pages_are_mapped_again_at_the_same_place() -> None:
    model = CachingAllocator(EXPANDABLE)
    model.malloc(20 * MIB)
    middle = model.malloc(40 * MIB)
    model.malloc(20 * MIB)
    model.free(middle)
    model.empty_cache()
    assert model.reserved_bytes == 40 * MIB
    assert model.malloc(40 * MIB) == middle
    assert model.reserved_bytes == 80 * MIB


# --- limits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", ["total_bytes", "limit_bytes"])
@pytest.mark.parametrize("config", [DEFAULT, EXPANDABLE])
def test_a_full_device_gives_its_cache_back_and_tries_once_more(config: AllocatorSettings, cap: str) -> None:
    model = CachingAllocator(config, **{cap: 60 * MIB})  # type: ignore[arg-type]
    model.free(model.malloc(40 * MIB, stream=1))
    model.malloc(40 * MIB)
    assert (model.alloc_retries, model.reserved_bytes, model.peak_reserved_bytes) == (1, 40 * MIB, 40 * MIB)


@pytest.mark.parametrize("cap", ["total_bytes", "limit_bytes"])
def test_a_limit_can_be_used_to_the_last_byte(cap: str) -> None:
    model = CachingAllocator(**{cap: 60 * MIB})  # type: ignore[arg-type]
    model.malloc(60 * MIB)
    assert (model.reserved_bytes, model.alloc_retries) == (60 * MIB, 0)


@pytest.mark.parametrize("cap", ["total_bytes", "limit_bytes"])
def test_a_limit_is_compared_with_the_segment_not_with_the_request(cap: str) -> None:
    model = CachingAllocator(**{cap: 10 * MIB})  # type: ignore[arg-type]
    with pytest.raises(OutOfMemory):
        model.malloc(2 * MIB)


@pytest.mark.parametrize("config", ALL_SETTINGS)
def test_out_of_memory_carries_the_numbers_and_changes_nothing(config: AllocatorSettings) -> None:
    model = CachingAllocator(config, total_bytes=100 * MIB, limit_bytes=64 * MIB)
    handle = model.malloc(40 * MIB)
    with pytest.raises(OutOfMemory, match=r"40\.0 MiB.*64\.0 MiB") as caught:
        model.malloc(40 * MIB)
    error = caught.value
    assert (error.requested_bytes, error.allocated_bytes, error.limit_bytes) == (40 * MIB, 40 * MIB, 64 * MIB)
    assert error.reserved_bytes == model.reserved_bytes
    assert model.alloc_retries == 1
    model.free(handle)
    model.malloc(60 * MIB)


def test_expandable_pages_may_pass_the_limit_by_less_than_one_page_as_in_pytorch() -> None:
    model = CachingAllocator(EXPANDABLE, limit_bytes=80 * MIB)
    model.malloc(512)
    model.malloc(60 * MIB + 512)  # 2 + 62 MiB pass the check, then four pages of 20 MiB are mapped
    assert model.reserved_bytes == 82 * MIB


def test_the_device_itself_is_never_exceeded_by_expandable_pages() -> None:
    model = CachingAllocator(EXPANDABLE, total_bytes=80 * MIB)
    model.malloc(512)
    with pytest.raises(OutOfMemory):
        model.malloc(60 * MIB + 512)


def test_a_limit_is_compared_with_the_whole_request_even_where_an_expandable_tail_would_serve() -> None:
    model = CachingAllocator(EXPANDABLE, limit_bytes=60 * MIB)
    model.malloc(28 * MIB)  # 40 MiB mapped, tail 12 MiB: 30 MiB more would need only one page
    with pytest.raises(OutOfMemory):
        model.malloc(30 * MIB)


# --- random histories ------------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 2 * MIB),
    st.integers(MIB, 90 * MIB),
    st.sampled_from([512, MIB, MIB + 512, 10 * MIB, 12 * MIB, 20 * MIB, 31 * MIB]),
)
# None empties the cache; an integer frees that live block, modulo their number; a pair allocates (size, stream).
STEPS = st.lists(
    st.one_of(st.tuples(SIZES, st.integers(0, 1)), st.tuples(SIZES, st.just(0)), st.integers(0, 99), st.none()),
    max_size=60,
)


def check_conservation(model: CachingAllocator, live: dict[int, int]) -> None:
    """Blocks tile their segments, live ones are where they were handed out, and the counters are the sums of the blocks."""
    allocated: dict[int, int] = {}
    reserved, end_of_last = 0, 0
    for view in model.segments():
        address, mapped = view.address, 0
        for start, size, _ in view.blocks:
            assert start == address
            assert size > 0
            address += size
        assert view.address >= end_of_last
        end_of_last = address
        for (_, _, left), (_, _, right) in zip(view.blocks, view.blocks[1:], strict=False):
            assert left != right or left == "allocated", "free neighbours were not merged"
        allocated |= {start: size for start, size, state in view.blocks if state == "allocated"}
        mapped = sum(size for _, size, state in view.blocks if state != "unmapped")
        assert mapped == view.size
        reserved += mapped
    assert reserved == model.reserved_bytes <= model.peak_reserved_bytes
    assert sum(allocated.values()) == model.allocated_bytes <= model.peak_allocated_bytes
    assert allocated.keys() == live.keys()
    assert all(allocated[handle] >= size for handle, size in live.items())


@settings(max_examples=300)
@given(steps=STEPS, config=st.sampled_from(ALL_SETTINGS), limit=st.sampled_from([None, 80 * MIB, 300 * MIB]))
def test_no_history_loses_a_byte_or_passes_the_limit(
    steps: list[tuple[int, int] | int | None], config: AllocatorSettings, limit: int | None
) -> None:
    changes: list[int] = []
    model = CachingAllocator(
        config,
        limit_bytes=limit,
        on_segment=lambda event, address, size, stream: changes.append(size if event in GROWTHS else -size),
    )
    live: dict[int, int] = {}
    for step in steps:
        if step is None:
            model.empty_cache()
        elif isinstance(step, tuple):
            try:
                live[model.malloc(*step)] = step[0]
            except OutOfMemory:
                assert limit is not None, "ran out of an unlimited device"
                assert model.reserved_bytes + segment_size(step[0]) > limit, "refused what would have fitted"
        elif live:
            handle = list(live)[step % len(live)]
            model.free(handle)
            del live[handle]
        check_conservation(model, live)
        assert sum(changes) == model.reserved_bytes
        page = 20 * MIB if config.expandable_segments else 0
        assert limit is None or model.peak_reserved_bytes <= limit + max(0, page - 1)
    for handle in list(live):
        model.free(handle)
    model.empty_cache()
    assert (model.allocated_bytes, model.reserved_bytes, len(model.segments())) == (0, 0, 0)
    assert model.segments() == []

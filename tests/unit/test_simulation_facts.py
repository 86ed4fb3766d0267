"""Facts about the simulated device: what each buffer, pinned page and library costs, and what a timeline keeps of a long run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unit.test_simulated_memory import MEBI_FLOATS, allocated, outside, simulated
from unit.test_timeline import Script, moment
from wanvram.config import Request, RunConfig
from wanvram.engine.devices import SimulatedDevice
from wanvram.kernels.scaled_attention import attention
from wanvram.machine.driver import LATER_BYTES, page_table_bytes
from wanvram.predict.simulate import simulated_device
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.libraries import KNOWN_TORCH, BufferPlan, Libraries
from wanvram.simulate.timeline import MAX_POINTS, Timeline, _kept
from wanvram.units import GIB, MIB

H200 = Libraries(GPUS["h200"])


# --- libraries ---------------------------------------------------------------------------------------------------------------


def test_the_rules_are_those_of_the_releases_of_torch_that_are_installed() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (bounds,) = re.findall(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', project)
    assert (*KNOWN_TORCH[0], *KNOWN_TORCH[1]) == tuple(map(int, bounds))


@pytest.mark.parametrize(
    ("operation", "plan"),
    [
        *((f"aten.{name}", BufferPlan(loads=("cublas",))) for name in ("mm.default", "bmm.out", "baddbmm.default")),
        ("aten.addmm.out", BufferPlan(loads=("cublas", "cublaslt"))),
        ("wanvram.scaled_product.default", BufferPlan(loads=("cublas", "cublaslt"))),
        ("aten.pow.Scalar", BufferPlan(during=(8,))),
        ("wanvram.rms_norm_.default", BufferPlan(loads=("triton",))),
        ("aten.add.Tensor", None),
    ],
)
def test_what_an_operation_loads_and_takes_is_known_by_its_name(operation: str, plan: BufferPlan | None) -> None:
    assert H200.plan(operation, ()) == plan


def test_a_library_without_buffers_of_its_own_keeps_none() -> None:
    assert [H200.persistent_buffers(name) for name in ("cublaslt", "cudnn", "triton")] == [(MIB,), (), ()]


def test_sums_that_are_a_result_are_no_buffer_of_flash_attention_and_cudnn_keeps_its_own() -> None:
    q = torch.empty((256, 12, 128), dtype=torch.bfloat16, device="meta")
    ada = Libraries(GPUS["rtx4090"])
    for operation, during in (("attention", (4 * 256 * 12, 16, 8)), ("attention_lse", (16, 8))):
        assert ada.plan(f"wanvram.{operation}.default", (q, q, q)) == BufferPlan((), during)
        assert H200.plan(f"wanvram.{operation}.default", (q, q, q)) == BufferPlan((8, 8), (256,), ("attention",))


# --- the device --------------------------------------------------------------------------------------------------------------


def plain(limit_bytes: int | None = None) -> SimulatedDevice:
    config = RunConfig("x", "", "simulated", Request.for_task("t2v-1.3B"), gpu="h200", memory_limit_bytes=limit_bytes)
    return simulated_device(config)


def test_what_comes_next_depends_on_everything_that_is_there_and_on_nothing_else() -> None:
    def state(*calls: str) -> Any:
        device = plain()
        kept: list[Any] = []
        with device.session():
            for call in calls:
                if call == "device":
                    kept.append(device.empty(MEBI_FLOATS, torch.float32))
                elif call == "gone":
                    device.empty(MEBI_FLOATS, torch.float32)
                elif call == "library":
                    device.memory.load_library("cudnn")
                else:
                    kept.append(device.host_empty(MEBI_FLOATS, torch.float32, pinned=call == "pinned"))
            return device.memory.state()

    calls = ("device", "gone", "library", "host", "pinned")
    alone = [state(call) for call in calls] + [state()]
    assert len(set(alone)) == len(alone)
    assert [state(call) for call in calls] == alone[:-1]
    assert simulated().memory.state() is None, "every allocation is heard by somebody"


def test_pinned_memory_takes_the_host_its_time_and_the_card_its_page_tables() -> None:
    device = plain()
    memory, rate = device.memory, device.clock.machine
    with device.session():
        before = memory.device_memory()
        pinned = device.host_empty((4, GIB), torch.uint8, pinned=True)
        assert device.clock.now() == pytest.approx(4 * GIB / rate.pin_bytes, rel=1e-3)
        assert memory.device_memory() - before == page_table_bytes(4 * GIB) > 0
        assert (memory.host(), memory.is_pinned(pinned), memory.is_host(pinned)) == ((4 * GIB, 4 * GIB), True, True)
        plain_host = device.host_empty((GIB,), torch.uint8)
        assert (memory.is_pinned(plain_host), memory.is_host(plain_host)) == (False, True)
        at = device.clock.now()
        del pinned
        assert device.clock.now() - at == pytest.approx(4 * GIB / rate.unpin_bytes)
        assert memory.host() == (GIB, 0)


def test_under_a_limit_the_allocator_gives_way_to_page_tables() -> None:
    device = plain(outside("h200") + LATER_BYTES + 64 * MIB)
    with device.session():
        assert device.memory.allocator.limit_bytes == 64 * MIB
        pinned = device.host_empty((4, GIB), torch.uint8, pinned=True)
        assert device.memory.allocator.limit_bytes == 64 * MIB - page_table_bytes(4 * GIB)
        more = device.host_empty((60, GIB), torch.uint8, pinned=True)
        assert device.memory.allocator.limit_bytes == 0, "and never below nothing"
        del pinned, more
        kept = device.memory.tables.held_bytes
        assert device.memory.allocator.limit_bytes == 64 * MIB - kept


def test_a_timeline_hears_of_modules_and_page_tables_outside_the_allocator() -> None:
    device = plain()
    timeline = Timeline.attach(device.memory)
    with device.session():
        device.memory.load_library("cudnn")
        device.memory.load_library("no module of it is known")
        pinned = device.host_empty((4, GIB), torch.uint8, pinned=True)
        del pinned
    held = device.memory.tables.held_bytes
    seen = [point[3] for point in timeline.record().points]
    context, modules = GPUS["h200"].context_bytes, GPUS["h200"].module_bytes["cudnn"]
    full = context + modules + page_table_bytes(4 * GIB)
    assert seen == [context, context + modules, context + modules, full, context + modules + held]
    assert seen[-1] == device.memory.device_memory()


def test_where_everything_was_used_before_its_buffers_are_there_and_no_component_s() -> None:
    device = plain()
    timeline = Timeline.attach(device.memory)
    timeline.begin("denoise", "stage", "dit")
    with device.session():
        device.memory.load_everything()
        assert allocated(device) == 32 * MIB
        assert device.memory.device_memory() - device.memory.read().reserved_bytes == outside("h200")
        x = device.empty(MEBI_FLOATS, torch.float32)
        kept = x @ x
        assert allocated(device) == 32 * MIB + 2 * MIB, "no workspace comes again"
        del kept
    timeline.end()
    groups = timeline.record().moments[0].alive
    assert {g.operation: g.component for g in groups if "workspace" in g.operation} == {"cublas workspace": None}


def test_what_a_model_under_construction_makes_inside_another_counts_on_the_host_again_afterwards() -> None:
    device = plain()
    with device.session(), device.memory.on_host(pinned=True):
        with device.memory.on_host():
            unpinned = torch.empty(MEBI_FLOATS, device="meta")
        pinned = torch.empty(MEBI_FLOATS, device="meta")
        assert device.memory.host() == (2 * MIB, MIB)
        del unpinned, pinned
    with device.session():
        x = torch.empty(MEBI_FLOATS, device="meta")
        assert (allocated(device), device.memory.host()[0]) == (MIB, 0)
        del x


def test_buffers_before_and_during_an_operation_are_gone_when_it_ends() -> None:
    device = simulated()
    with device.session():
        q = device.empty((256, 12, 128), torch.bfloat16)
        outputs = [attention(q, q, q), attention(q, q, q)]
        live = sorted(nbytes for nbytes, _ in device.memory.live.values())
        assert live == [2 * 12 * 256 * 128] * 3
        outputs.clear()


# --- the allocator -----------------------------------------------------------------------------------------------------------


def test_a_block_that_another_stream_still_uses_is_no_longer_counted_and_not_given_again() -> None:
    model = CachingAllocator()
    first = model.malloc(12 * MIB)
    model.await_stream(first)
    assert model.allocated_bytes == 0
    assert model.malloc(12 * MIB) != first
    model.free(first)
    assert (model.allocated_bytes, model.malloc(12 * MIB)) == (12 * MIB, first)


def test_the_state_of_an_allocator_is_what_later_calls_depend_on() -> None:
    def state(*sizes: int, free: int = 0, awaited: int = 0) -> Any:
        model = CachingAllocator()
        handles = [model.malloc(size) for size in sizes]
        for handle in handles[:awaited]:
            model.await_stream(handle)
        for handle in handles[:free]:
            model.free(handle)
        return model.state()

    one = state(MIB, 3 * MIB)
    assert one == state(MIB, 3 * MIB)
    others = [state(3 * MIB, MIB), state(MIB, 4 * MIB), state(MIB, 3 * MIB, free=1), state(MIB, 3 * MIB, awaited=1)]
    assert len({one, *others}) == 5


def test_addresses_that_were_given_back_join_their_neighbours_and_serve_a_larger_segment() -> None:
    model = CachingAllocator()
    first, second, third = (model.malloc(32 * MIB) for _ in range(3))
    assert first - second == second - third == 32 * MIB, "new ranges lie below all others"
    for handle in (third, first, second):
        model.free(handle)
        model.empty_cache()
    assert model.malloc(96 * MIB) == third
    model = CachingAllocator()
    whole = model.malloc(20 * MIB)
    assert model.malloc(12 * MIB) == whole + 20 * MIB, "what is left of 32 MiB"


def test_of_two_gaps_the_smaller_is_used() -> None:
    model = CachingAllocator()
    handles = [model.malloc(size * MIB) for size in (96, 32, 64, 32)]
    for handle in (handles[0], handles[2]):
        model.free(handle)
    model.empty_cache()
    assert model.malloc(64 * MIB) == handles[2]


def test_expandable_pages_follow_a_free_tail_and_start_anew_where_none_is_long_enough() -> None:
    model = CachingAllocator(AllocatorSettings(expandable_segments=True), total_bytes=160 * MIB)
    first = model.malloc(20 * MIB)
    (view,) = model.segments()
    assert sum(size for _, size, _ in view.blocks) == 180 * MIB, "nine eighths of the device, in whole pages"
    assert view.size == 20 * MIB
    assert model.malloc(100 * MIB) == first + 20 * MIB
    assert model.malloc(20 * MIB) == first + 120 * MIB
    assert model.reserved_bytes == 140 * MIB


def test_the_last_pages_given_back_close_the_segment_and_say_so() -> None:
    heard: list[tuple[str, int]] = []
    model = CachingAllocator(
        AllocatorSettings(expandable_segments=True), on_segment=lambda event, _, size, __: heard.append((event, size))
    )
    model.free(model.malloc(50 * MIB))
    model.empty_cache()
    assert heard == [("segment_map", 60 * MIB), ("segment_unmap", 60 * MIB)]
    assert (model.segments(), model.reserved_bytes, model.peak_reserved_bytes) == ([], 0, 60 * MIB)


# --- the timeline ------------------------------------------------------------------------------------------------------------


def test_a_history_has_every_call_in_order_with_segments_before_what_they_are_for() -> None:
    run = Script()
    run.take("a", 3 * MIB)
    run.take("b", 30 * MIB)
    run.give("a")
    run.timeline.outside(500)
    run.allocator.empty_cache()
    run.take("c", 5 * MIB)
    assert [(action, nbytes, owner and owner.shape) for action, _, nbytes, owner in run.timeline.history()] == [
        ("segment_alloc", 20 * MIB, None),
        ("alloc", 3 * MIB, (3 * MIB,)),
        ("segment_alloc", 30 * MIB, None),
        ("alloc", 30 * MIB, (30 * MIB,)),
        ("free_requested", 3 * MIB, None),
        ("free_completed", 3 * MIB, None),
        ("segment_free", 20 * MIB, None),
        ("segment_alloc", 20 * MIB, None),
        ("alloc", 5 * MIB, (5 * MIB,)),
    ]


def test_a_peak_at_the_last_event_of_a_stage_is_its_own_and_one_between_stages_is_nobody_s() -> None:
    run = Script()
    run.timeline.begin("denoise", "stage", "dit")
    run.take("a", 10 * MIB)
    run.timeline.end()
    assert moment(run.result(), "peak")["stage"] == "denoise"
    run.take("b", 10 * MIB)
    run.give("b")
    run.timeline.begin("decode", "stage", "vae")
    run.timeline.end()
    assert moment(run.result(), "peak")["stage"] is None


def test_what_was_there_before_a_load_is_no_weight_and_its_last_block_is_one() -> None:
    run = Script()
    run.take("before", 4 * MIB)
    run.timeline.begin("load dit", "load", "dit")
    run.take("w", 8 * MIB)
    run.timeline.end()
    run.timeline.begin("denoise", "stage", "dit")
    run.take("x", 2 * MIB)
    run.timeline.end()
    assert run.result()["weights"] == [{"component": "dit", "bytes": 8 * MIB, "start": 2, "end": 4}]


def test_only_of_the_last_load_what_was_freed_inside_it_counts_as_weights() -> None:
    run = Script()
    for name in ("dit", "vae"):
        run.timeline.begin(f"load {name}", "load", name)
        run.take(name, 8 * MIB)
        run.give(name)
        run.timeline.end()
    assert [(w["component"], w["start"], w["end"]) for w in run.result()["weights"]] == [("vae", 3, 4)]


def test_where_nothing_is_known_outside_the_allocator_the_device_s_figure_is_not_either() -> None:
    allocator = CachingAllocator()
    timeline = Timeline(allocator)
    timeline.malloc(allocator.malloc(MIB), "aten.mm.default")
    assert [point[3] for point in timeline.record().points] == [None, None]


def series(points: int) -> np.ndarray:
    found: np.ndarray = np.zeros((3, points), dtype=np.int64)
    found[0] = found[1] = 10
    return found


def test_a_run_of_4000_points_is_kept_whole_and_one_more_is_thinned_out() -> None:
    assert MAX_POINTS == 4000
    assert _kept(series(4000), set()).tolist() == list(range(4000))
    thinned = _kept(series(4001), {7, 4000})
    assert len(thinned) <= 4000
    assert {0, 7, 4000} <= set(thinned.tolist())


def test_a_long_run_keeps_the_highest_device_memory_and_the_largest_unused_share_of_every_stretch() -> None:
    run = series(6000)
    run[0, 1::6], run[1, 1::6] = 12, 20  # the share that is unused: neither the least allocated nor the most reserved
    run[0, 2::6], run[1, 2::6] = 100, 100
    run[2, 2003] = 1001
    run[:, 3004] = 60, 60, 980  # the most of the device: neither the most reserved nor the most beside it
    kept = set(_kept(run, set()).tolist())
    assert {2003, 3004} <= kept
    assert sum(x % 6 == 1 for x in kept) > 900
    assert len(kept) <= MAX_POINTS


@pytest.mark.parametrize(("spans", "marked"), [(500, True), (501, False)])
def test_the_ends_of_up_to_500_spans_are_points_of_a_long_run(spans: int, marked: bool) -> None:
    run = Script()
    for number in range(spans):
        run.timeline.begin(f"step {number}", "step", None)
        for _ in range(9):
            run.timeline.outside(0)
        run.timeline.end()
    result = run.result()
    points = {point[0] for point in result["points"]}
    ends = {x for stage in result["stages"] for x in (stage["start"], stage["end"])}
    assert len(points) <= MAX_POINTS
    assert (ends <= points) is marked

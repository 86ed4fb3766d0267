"""The simulated clock: hand-computed timelines, prices by shape, order between cards and strategies, and measured H200 times."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import pytest
import torch

from wanvram.config import RunConfig
from wanvram.engine.devices import SimulatedDevice
from wanvram.kernels.conv import conv3d
from wanvram.kernels.elementwise import gated_add_
from wanvram.kernels.scaled_attention import attention
from wanvram.predict.simulate import simulate
from wanvram.record import RunRecord
from wanvram.recorder.recorder import Recorder
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.clock import Clock, Costs
from wanvram.simulate.gpus import EFFICIENCY, GPU, GPUS
from wanvram.simulate.host import HOST
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.links import Link
from wanvram.simulate.memory import SimulatedMemory
from wanvram.spans import Copies, Span
from wanvram.units import GIB

# Every rate of this card is round: 1e12 operations, 1e11 bytes and 1e10 copied bytes per second; issuing costs nothing.
PLAIN = replace(
    EFFICIENCY,
    **dict.fromkeys(("product", "product_fp8", "product_fp32", "attention", "attention_fp32", "memory"), 1.0),
    **dict.fromkeys(("conv_tf32", "conv_tf32_narrow", "conv_half", "conv_half_narrow"), 1.0),
    **dict.fromkeys(("launch_seconds", "view_seconds", "dispatch_seconds", "own_seconds"), 0.0),
)
RATES = {"bf16_flops": 1e12, "fp32_flops": 1e11, "fp8_flops": 4e12, "bandwidth_bytes": 1e11, "pcie_bytes": 1e10}
CARD = GPU(
    key="plain",
    name="Plain",
    total_bytes=80 * GIB,
    compute_capability=(9, 0),
    context_bytes=0,
    efficiency=PLAIN,
    **RATES,
)
MACHINE = replace(HOST, pageable_bytes=1e9, copy_bytes=2e9, disk_bytes=5e8)


@dataclass
class Shaped:
    """As much of a tensor as a price asks for."""

    shape: tuple[int, ...]
    itemsize: int = 2

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize


def seconds(operation: str, args: tuple[Any, ...], result: Any = None, gpu: GPU = CARD) -> float:
    costs = Costs(gpu)
    price = costs.price(operation)
    assert price is not None
    return costs.seconds(price.work(args, result))


def computing(clock: Clock, duration: float) -> None:
    """A kernel that takes `duration` seconds: it writes that many times the bandwidth."""
    price = clock.costs.price("aten.zero_.default")
    assert price is not None
    clock.compute(price, (), Shaped((int(duration * 1e11),), 1))


@pytest.fixture
def clock() -> Clock:
    return Clock(CARD, MACHINE)


@pytest.fixture
def device() -> SimulatedDevice:
    return simulated_device(CARD)


def simulated_device(gpu: GPU) -> SimulatedDevice:
    allocator = CachingAllocator(AllocatorSettings(), total_bytes=gpu.total_bytes)
    return SimulatedDevice(SimulatedMemory(gpu, allocator, Libraries(gpu)))


# --- timelines ---------------------------------------------------------------------------------------------------------


def test_a_copy_behind_computation_costs_nothing(clock: Clock) -> None:
    mark = clock.prefetch(int(1e10), None)  # 1 s
    computing(clock, 3.0)
    clock.wait(mark)
    computing(clock, 2.0)
    clock.synchronize()
    assert clock.now() == pytest.approx(5.0)
    assert clock.copied == Copies(int(1e10), 1.0, 0.0)
    assert clock.copied.hidden_share == 1.0


def test_computation_stalls_for_the_rest_of_a_longer_copy(clock: Clock) -> None:
    mark = clock.prefetch(int(4e10), None)  # 4 s
    computing(clock, 3.0)
    clock.wait(mark)
    computing(clock, 2.0)
    clock.synchronize()
    assert clock.now() == pytest.approx(6.0)
    assert clock.copied.stalled_seconds == pytest.approx(1.0)
    assert clock.copied.hidden_share == pytest.approx(0.75)


def test_copies_follow_one_another(clock: Clock) -> None:
    first, second = clock.prefetch(int(1e10), None), clock.prefetch(int(2e10), None)
    assert (first, second) == (pytest.approx(1.0), pytest.approx(3.0))


def test_a_copy_waits_until_its_slot_is_free(clock: Clock) -> None:
    computing(clock, 3.0)
    free = clock.mark()
    assert clock.prefetch(int(1e10), free) == pytest.approx(4.0)


def two_slots(clock: Clock, pieces: int, copying: float, computed: float) -> float:
    """The order of calls of engine.streaming.SlotRing."""
    free: list[float | None] = [None, None]
    marks = [clock.prefetch(int(copying * 1e10), None) for _ in range(2)]
    for piece in range(pieces):
        clock.wait(marks[piece])
        computing(clock, computed)
        free[piece % 2] = clock.mark()
        if piece + 2 < pieces:
            marks.append(clock.prefetch(int(copying * 1e10), free[piece % 2]))
    clock.synchronize()
    return clock.now()


def test_two_slots_bound_by_computation_show_the_first_copy_only(clock: Clock) -> None:
    assert two_slots(clock, 10, copying=1.0, computed=3.0) == pytest.approx(1.0 + 10 * 3.0)
    assert clock.copied.stalled_seconds == pytest.approx(1.0)


def test_two_slots_bound_by_copies_show_the_last_computation_only(clock: Clock) -> None:
    """The copies never pause: piece n is computed (1 s) long before piece n+1 has arrived (3 s)."""
    assert two_slots(clock, 10, copying=3.0, computed=1.0) == pytest.approx(10 * 3.0 + 1.0)
    assert clock.copied.stalled_seconds == pytest.approx(10 * 3.0 - 9 * 1.0)


def test_waiting_for_copies_at_the_end_of_a_step_is_a_stall_too(clock: Clock) -> None:
    computing(clock, 1.0)
    clock.prefetch(int(3e10), None)
    clock.synchronize()
    assert clock.now() == pytest.approx(3.0)
    assert clock.copied.stalled_seconds == pytest.approx(2.0)


def test_a_blocking_copy_waits_for_computation_and_holds_up_the_host(clock: Clock) -> None:
    computing(clock, 2.0)
    clock.transfer(int(1e10), pinned=True)
    assert clock.now() == pytest.approx(3.0)
    clock.transfer(int(1e9), pinned=False)
    assert clock.now() == pytest.approx(4.0)
    assert clock.copied == Copies()


def test_pageable_memory_is_never_faster_than_the_link() -> None:
    clock = Clock(CARD, replace(MACHINE, pageable_bytes=1e12))
    clock.transfer(int(1e10), pinned=False)
    assert clock.now() == pytest.approx(1.0)


def test_reading_from_disk_comes_before_its_copy_and_overlaps_computation(clock: Clock) -> None:
    clock.read_from_disk(int(1e9), "dit")  # 2 s
    mark = clock.prefetch(int(1e9), None)  # 0.1 s after it
    computing(clock, 1.5)
    assert mark == pytest.approx(2.1)
    clock.wait(mark)
    clock.synchronize()
    assert clock.now() == pytest.approx(2.1)
    assert clock.copied.stalled_seconds == pytest.approx(0.6)


def test_a_buffer_is_read_into_again_only_after_its_copy(clock: Clock) -> None:
    clock.read_from_ram(int(2e9))  # 1 s
    computing(clock, 5.0)
    copied = clock.prefetch(int(1e10), clock.mark())  # the slot is free at 5 s
    assert copied == pytest.approx(6.0)
    clock.reader_waits(copied)
    clock.read_from_ram(int(2e9))
    assert clock.prefetch(int(1e10), None) == pytest.approx(6.0 + 1.0 + 1.0)


def test_a_copy_from_pinned_memory_does_not_wait_for_what_was_read_for_another(clock: Clock) -> None:
    clock.read_from_disk(int(1e9), "dit")
    clock.prefetch(0, None)
    assert clock.prefetch(int(1e10), 1.5) == pytest.approx(2.0 + 1.0)  # behind the first copy, no second reading


NVLINK, BUS = Link("nvlink", 1e10, 0.0, 8, "a test"), Link("pcie4", 1e10, 0.0, 2, "a test")


def test_weights_from_other_cards_come_beside_copies_and_computation_over_a_quarter_of_the_channels() -> None:
    clock = Clock(CARD, MACHINE, link=NVLINK)
    own = clock.prefetch(int(1e10), None)
    there = clock.start_gather(int(1e10), 0, own)
    assert (own, there) == (pytest.approx(1.0), pytest.approx(1.0 + 4.0))
    assert clock.prefetch(int(1e10), None) == pytest.approx(2.0)
    computing(clock, 3.0)
    clock.wait(there)
    clock.synchronize()
    assert clock.now() == pytest.approx(5.0)
    assert clock.copied.stalled_seconds == pytest.approx(2.0)
    assert clock.exchanged_bytes == int(1e10)


def test_over_a_bus_weights_from_other_cards_hold_up_copies_and_exchanges() -> None:
    clock = Clock(CARD, MACHINE, link=BUS)
    there = clock.start_gather(int(1e10), 0, clock.prefetch(int(1e10), None))
    assert there == pytest.approx(2.0)
    assert clock.prefetch(int(1e10), None) == pytest.approx(3.0)
    assert clock.start_exchange(int(1e10), 0) == pytest.approx(3.0)
    assert clock.start_gather(int(1e10), 0, None) == pytest.approx(4.0)


def test_processes_that_read_parts_of_one_file_share_the_disk_and_not_the_page_cache() -> None:
    one, two = (Clock(CARD, replace(MACHINE, cached_share=0.0)) for _ in range(2))
    one.load_from_disk(int(1e9), "dit")
    two.load_from_disk(int(1e9) // 2, "dit", readers=2)
    assert one.now() == pytest.approx(two.now())
    one, two = (Clock(CARD, replace(MACHINE, cached_share=1.0)) for _ in range(2))
    one.load_from_disk(int(1e9), "dit")
    two.load_from_disk(int(1e9) // 2, "dit", readers=2)
    assert one.now() == pytest.approx(2 * two.now())


def test_a_slow_host_holds_up_the_device() -> None:
    """1 s to issue what the device does in 0.25 s: the device idles; the other way round it does not."""
    clock = Clock(replace(CARD, efficiency=replace(PLAIN, dispatch_seconds=1.0)), MACHINE)
    for _ in range(4):
        computing(clock, 0.25)
    clock.synchronize()
    assert clock.now() == pytest.approx(4.25)
    for _ in range(4):
        computing(clock, 3.0)
    clock.synchronize()
    assert clock.now() == pytest.approx(4.25 + 1.0 + 4 * 3.0)


def test_copies_are_counted_between_two_moments(clock: Clock) -> None:
    clock.prefetch(int(1e10), None)
    before = clock.copied
    clock.wait(clock.prefetch(int(3e10), None))
    assert clock.copied - before == Copies(int(3e10), pytest.approx(3.0), pytest.approx(4.0))
    assert Copies().hidden_share is None
    assert (clock.copied - before).hidden_share == 0.0


# --- prices ------------------------------------------------------------------------------------------------------------


def test_a_product_costs_two_operations_per_term() -> None:
    a, b = Shaped((1000, 2000)), Shaped((2000, 3000))
    assert seconds("aten.mm.default", (a, b)) == pytest.approx(2 * 1000 * 2000 * 3000 / 1e12)
    assert seconds("aten.addmm.out", (Shaped((3000,)), a, b)) == seconds("aten.mm.default", (a, b))
    batch = Shaped((4, 1000, 2000)), Shaped((4, 2000, 3000))
    assert seconds("aten.bmm.default", batch) == pytest.approx(4 * seconds("aten.mm.default", (a, b)))


def test_products_run_at_the_rate_of_their_dtype() -> None:
    def product(itemsize: int) -> float:
        return seconds("aten.mm.default", (Shaped((4000, 4000), itemsize), Shaped((4000, 4000), itemsize)))

    assert product(4) == pytest.approx(10 * product(2))
    assert product(1) == pytest.approx(product(2) / 4)


def test_a_product_of_one_row_is_bound_by_reading_the_matrix() -> None:
    matrix = Shaped((4000, 4000))
    assert seconds("aten.mm.default", (Shaped((1, 4000)), matrix)) == pytest.approx(matrix.nbytes / 1e11, rel=1e-3)


def test_attention_grows_with_queries_times_keys() -> None:
    q, k = Shaped((8192, 12, 128)), Shaped((32768, 12, 128))
    whole = seconds("wanvram.attention.default", (k, k, k), k)
    assert whole == pytest.approx(4 * 32768**2 * 12 * 128 / 1e12, rel=0.01)
    assert 4 * seconds("wanvram.attention.default", (q, k, k), q) == pytest.approx(whole)


def test_float32_convolutions_use_tf32_where_the_card_has_it() -> None:
    args = Shaped((1, 256, 4, 64, 64), 4), Shaped((256, 256, 3, 3, 3), 4)
    out = Shaped((1, 256, 2, 64, 64), 4)
    flops = 2 * prod(out.shape) * 256 * 27
    assert seconds("wanvram.conv3d.default", args, out) == pytest.approx(flops / 5e11)
    old = replace(CARD, compute_capability=(7, 5))
    assert seconds("wanvram.conv3d.default", args, out, old) == pytest.approx(flops / 1e11)


def test_elementwise_operations_cost_what_they_read_and_write() -> None:
    x, y = Shaped((10, 100), 4), Shaped((10, 100), 2)
    cases = [
        ("aten.add.Tensor", (x, x), x, 12000),
        ("aten.add_.Tensor", (x, y), x, 10000),
        ("aten.copy_.default", (x, y), x, 6000),
        ("aten.zero_.default", (x,), x, 4000),
        ("aten.cat.default", ([x, x],), Shaped((20, 100), 4), 16000),
        ("aten.index_select.default", (Shaped((100000, 100), 4), 0, Shaped((10,), 8)), x, 8000),
        ("wanvram.gated_add_.default", (x, y, Shaped((100,), 4)), None, 10400),
        ("wanvram.layer_norm_modulate.default", (x, Shaped((100,), 4), Shaped((100,), 4), 1e-6, 1.0), y, 6800),
    ]
    for operation, args, result, nbytes in cases:
        assert seconds(operation, args, result) == pytest.approx(nbytes / 1e11), operation


@pytest.mark.parametrize(
    ("operation", "args", "result", "measured"),
    [
        ("attention", ((75600, 40, 128),) * 3, (75600, 40, 128), 0.203),
        ("attention", ((9450, 40, 128), *((75600, 40, 128),) * 2), (9450, 40, 128), 0.02535),
        ("attention", ((32760, 12, 128),) * 3, (32760, 12, 128), 0.0105),
        ("mm", ((75600, 5120), (5120, 15360)), (75600, 15360), 0.0167),
        ("mm", ((9450, 5120), (5120, 13824)), (9450, 13824), 0.00193),
        ("mm", ((32760, 1536), (1536, 8960)), (32760, 8960), 0.00114),
        ("conv3d", ((1, 384, 4, 120, 208), (384, 384, 3, 3, 3)), (1, 384, 2, 120, 208), 0.00183),
        ("conv3d", ((1, 192, 6, 240, 416), (192, 192, 3, 3, 3)), (1, 192, 4, 240, 416), 0.00371),
        ("conv3d", ((1, 96, 3, 480, 832), (96, 96, 3, 3, 3)), (1, 96, 1, 480, 832), 0.00153),
    ],
)
def test_single_kernels_are_priced_as_an_h200_ran_them(
    operation: str, args: tuple[tuple[int, ...], ...], result: tuple[int, ...], measured: float
) -> None:
    """h200.md and benchmarks/2026-11-24_h200_probe_libraries.json; alone they run up to 10 % faster than in a hot step."""
    itemsize = 4 if operation == "conv3d" else 2
    name = f"aten.{operation}.default" if operation == "mm" else f"wanvram.{operation}.default"
    shaped = tuple(Shaped(shape, itemsize) for shape in args)
    assert seconds(name, shaped, Shaped(result, itemsize), GPUS["h200"]) == pytest.approx(measured, rel=0.15)


# --- the simulated device ------------------------------------------------------------------------------------------------


def test_views_and_allocations_take_no_device_time(device: SimulatedDevice) -> None:
    with device.session():
        x = device.empty((64, 64), torch.float32)
        views = [x.view(-1), x.t(), x[3:5, ::2], x.unbind(0), x.expand(2, 64, 64), torch.empty_like(x)]
        device.memory.synchronize()
    assert len(views) == 6
    assert device.clock.now() == 0.0
    assert set(device.clock.busy.values()) == {0.0}


def test_operations_of_a_session_are_booked_by_category(device: SimulatedDevice) -> None:
    with device.session():
        q = device.empty((512, 4, 64), torch.bfloat16)
        out = attention(q, q, q).view(512, 256)
        x = device.empty((512, 256), torch.float32)
        gated_add_(x, torch.mm(out, out.t()[:, :256]), device.empty((256,), torch.float32))
        frame = torch.empty((1, 32, 1, 8, 8), device="meta", memory_format=torch.channels_last_3d)
        conv3d(frame, torch.empty((32, 32, 1, 3, 3), device="meta"), None, (1, 1, 1), (0, 1, 1))
    busy = device.clock.busy
    assert min(busy[name] for name in ("attention", "product", "convolution", "elementwise")) > 0.0
    assert busy["product"] == pytest.approx(2 * 512 * 256 * 256 / 1e12, rel=0.5)


def test_models_under_construction_take_no_time(device: SimulatedDevice) -> None:
    with device.session(), device.building():
        torch.nn.Linear(1000, 1000, device="meta")
    assert device.clock.now() == device.clock.mark() == 0.0


def test_computing_on_the_host_takes_the_host_s_time(device: SimulatedDevice) -> None:
    with device.session(), device.computing_on_host():
        a = torch.empty((4096, 4096), device="meta", dtype=torch.bfloat16)
        torch.mm(a, a)
    assert device.clock.now() == pytest.approx(2 * 4096**3 / HOST.flops)
    assert set(device.clock.busy.values()) == {0.0}


def test_copies_of_a_device_are_timed_by_where_the_host_keeps_them(device: SimulatedDevice) -> None:
    def duration(action: Callable[[], object]) -> float:
        before = device.clock.now()
        action()
        return device.clock.now() - before

    size = (int(1e9),)
    with device.session():
        on_device = device.empty(size, torch.uint8)
        pinned, pageable = device.host_empty(size, torch.uint8, pinned=True), device.host_empty(size, torch.uint8)
        assert duration(lambda: device.copy(on_device, pinned)) == pytest.approx(0.1)
        assert duration(lambda: device.copy(on_device, pageable)) == pytest.approx(1e9 / HOST.pageable_bytes)
        assert duration(lambda: device.upload(pinned)) == pytest.approx(0.1)
        assert duration(lambda: device.download(on_device)) == pytest.approx(1e9 / HOST.pageable_bytes)
        assert duration(lambda: device.copy_on_host(pageable, pinned)) == pytest.approx(1e9 / HOST.copy_bytes)
        assert duration(lambda: device.copy_on_host(pinned, pageable)) == 0.0  # the reading thread's
        assert device.prefetch(on_device, pinned, device.mark()) - device.clock.now() == pytest.approx(
            1e9 / HOST.copy_bytes + 0.1
        )


def test_the_clock_needs_no_torch() -> None:
    code = "import sys, wanvram.simulate.clock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- spans -------------------------------------------------------------------------------------------------------------


def test_a_span_of_a_simulated_run_has_predicted_seconds_and_so_has_loading(device: SimulatedDevice) -> None:
    recorder = Recorder(device.meter, None, None)
    with device.session():
        with recorder.span("load", kind="load"):
            device.clock.transfer(int(1e10), pinned=True)  # at 10 GB/s
        with recorder.span("stage", kind="stage"):
            for count in (1, 7):
                with recorder.span("step", kind="step") as span:
                    computing(device.clock, 2.0)
                span.repeats = count
            computing(device.clock, 0.5)
    load, stage = recorder.spans
    assert load.seconds == pytest.approx(1.0)
    assert [step.seconds for step in stage.children] == [pytest.approx(2.0)] * 2
    assert stage.seconds == pytest.approx(2.0 + 7 * 2.0 + 0.5)


# --- whole runs --------------------------------------------------------------------------------------------------------


@cache
def predicted(
    task: str, size: str, gpu: str = "h200", frames: int = 81, steps: int = 2, **knobs: Any
) -> tuple[RunRecord, Clock]:
    model = {k: v for k, v in knobs.items() if k in ("load_strategy", "t5_cpu")}
    config = RunConfig.from_dict(
        {
            "name": "clock",
            "model_config": {"precision": "bf16", "load_strategy": "full", "offload": True} | model,
            "optimization": {k: v for k, v in knobs.items() if k not in model},
            "request": {"task": task, "size": size, "frame_num": frames, "sample_steps": steps, "weights": "random"},
        }
    )
    record, memory = simulate(replace(config, device="simulated", gpu=gpu))
    assert record.failure is None
    return record, memory.clock


def run(*args: Any, **knobs: Any) -> RunRecord:
    return predicted(*args, **knobs)[0]


def stage(record: RunRecord, name: str) -> Span:
    return next(s for s in record.stages if s.name == name)


def step_seconds(record: RunRecord) -> float:
    """Of the last, in which nothing is used for the first time."""
    seconds = stage(record, "denoise").children[-1].seconds
    assert seconds is not None
    return seconds


@pytest.mark.parametrize(
    ("task", "size", "step", "decode"),
    [("t2v-1.3B", "832*480", 1.036, 1.480), ("t2v-14B", "1280*720", 22.09, 3.685)],
)
def test_resident_runs_take_the_time_an_h200_took(task: str, size: str, step: float, decode: float) -> None:
    """benchmarks/2026-11-24_beside_diffusers_*.json, the decodes 2026-11-30_beside_diffusers_1.3B.json and ..._h200_tiled_vae.json."""
    record = run(task, size)
    assert step_seconds(record) == pytest.approx(step, rel=0.05)
    once = HOST.first_use["cudnn"].warm
    assert (stage(record, "decode").seconds or 0.0) - once == pytest.approx(decode, rel=0.1)


@pytest.mark.parametrize(
    ("gpu", "count"),
    [
        ("h200", 132),
        ("b200", 148),
        ("a100-80gb", 108),
        ("rtx4090", 128),
        ("rtx3090", 82),
        ("rtx4060", 24),
        ("t4", 40),
        ("h20", 87),
    ],
)
def test_multiprocessors_follow_from_published_rates(gpu: str, count: int) -> None:
    assert GPUS[gpu].multiprocessors == count


@pytest.mark.parametrize(
    ("channels", "rows", "columns", "times"),
    [(384, 60, 104, 132 / 98), (384, 120, 208, 396 / 390), (96, 120, 480, 528 / 450), (96, 8, 8, 2.0)],
)
def test_a_convolution_of_a_picture_takes_whole_rounds_of_the_multiprocessors(
    channels: int, rows: int, columns: int, times: float
) -> None:
    """384 channels at 60x104 reach 304 TFLOP/s where they reach 404 at 120x208 (2026-11-30_h200_convolution_kernels.json)."""
    work = Costs(GPUS["h200"]).price("wanvram.conv2d.default")
    assert work is not None
    x, weight = (torch.empty(1, 3 * channels, rows, columns), torch.empty(channels, 3 * channels, 3, 3))
    out = torch.empty(1, channels, rows, columns)
    flops = work.work((x, weight, None, (1, 1), (1, 1)), out)[0]
    padding = -(-channels // 32) * 32 / channels
    assert flops == pytest.approx(2 * padding * 27 * channels * out.numel() * times)


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 132 / 98), (torch.float32, 1.0)])
def test_frames_in_16_bits_take_whole_rounds_as_pictures_do(dtype: torch.dtype, times: float) -> None:
    work = Costs(GPUS["h200"]).price("wanvram.conv3d.default")
    assert work is not None
    x, weight = torch.empty(1, 384, 3, 60, 104, dtype=dtype), torch.empty(384, 384, 3, 3, 3, dtype=dtype)
    out = torch.empty(1, 384, 1, 60, 104, dtype=dtype)
    flops = work.work((x, weight, None, (1, 1, 1), (0, 1, 1)), out)[0]
    assert flops == pytest.approx(2 * 27 * 384 * out.numel() * times)


SMALL = {"task": "t2v-1.3B", "size": "832*480", "frames": 5, "t5_cpu": True}


def test_the_same_run_is_predicted_to_the_same_nanosecond() -> None:
    first = run(**SMALL)
    predicted.cache_clear()
    assert [s.seconds for s in run(**SMALL).stages] == [s.seconds for s in first.stages]


def test_a_card_that_is_faster_in_everything_is_never_slower() -> None:
    order = ["rtx4060", "rtx4090", "h200"]
    records = [run(**SMALL, gpu=gpu) for gpu in order]
    seconds = [step_seconds(record) for record in records]
    assert seconds == sorted(seconds, reverse=True)
    decodes = [stage(record, "decode").seconds for record in records]
    assert decodes == sorted(decodes, reverse=True)
    assert step_seconds(records[0]) > 10 * step_seconds(records[-1])


def test_streaming_is_never_faster_and_costs_what_cannot_hide() -> None:
    """Five frames of 480P are issued in 2 x 42 ms a step; 2 x 2.6 GB of weights take 2 x 47 ms."""
    block = SMALL | {"load_strategy": "block"}
    resident, together = run(**SMALL), run(**SMALL, cfg="joint")
    streamed, joint = run(**block), run(**block, cfg="joint")
    assert step_seconds(resident) <= step_seconds(streamed)
    assert step_seconds(together) <= step_seconds(joint) < step_seconds(streamed)
    assert step_seconds(streamed) == pytest.approx(0.094, rel=0.15)
    slow = step_seconds(run(**block, gpu="rtx4060")) / step_seconds(run(**SMALL, gpu="rtx4060"))
    assert 1.0 <= slow < 1.2


def test_joint_guidance_halves_the_copies() -> None:
    """One pass per step instead of two; the two units that begin the pass after the last are copied in both."""
    block = SMALL | {"load_strategy": "block"}
    (_, alone), (_, joint) = predicted(**block), predicted(**block, cfg="joint")
    assert joint.copied.nbytes == pytest.approx(alone.copied.nbytes / 2, rel=0.02)
    assert alone.copied.hidden_share is not None
    assert joint.copied.hidden_share is not None
    assert alone.copied.hidden_share < joint.copied.hidden_share < 1.0

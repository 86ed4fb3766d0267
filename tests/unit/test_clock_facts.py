"""Facts about predicted times: every rate and price by a card whose figures are round, every timeline by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from unit.test_clock import BUS, CARD, MACHINE, NVLINK, PLAIN, Shaped, computing, seconds
from wanvram.simulate.clock import PLAN_SECONDS, Clock, Costs
from wanvram.simulate.gpus import GPU, GPUS
from wanvram.simulate.host import HOST, FirstUse, Reading
from wanvram.simulate.links import link_of
from wanvram.spans import Copies

# Where memory is slow enough, traffic decides: a byte takes a microsecond.
SLOW = replace(CARD, bandwidth_bytes=1e6)
SECOND = int(1e10)  # bytes that the link takes a second for


def of_share(**shares: float) -> GPU:
    return replace(CARD, efficiency=replace(PLAIN, **shares))


def product(itemsize: int, gpu: GPU, size: int = 4000) -> float:
    square = Shaped((size, size), itemsize)
    return seconds("aten.mm.default", (square, square), gpu=gpu)


def scaled(gpu: GPU, m: int, k: int, n: int) -> float:
    x, weight, one = Shaped((m, k), 1), Shaped((n, k), 1), Shaped((1,), 4)
    return seconds("wanvram.scaled_product.default", (x, one, weight, one), Shaped((m, n)), gpu)


def attended(lq: int, lk: int, gpu: GPU, itemsize: int = 2, heads: int = 2, width: int = 64) -> float:
    q, k = Shaped((lq, heads, width), itemsize), Shaped((lk, heads, width), itemsize)
    return seconds("wanvram.attention.default", (q, k, k), q, gpu)


def convolved(inputs: int, outputs: int, gpu: GPU, itemsize: int = 4) -> float:
    x, weight = Shaped((1, inputs, 4, 16, 16), itemsize), Shaped((outputs, inputs, 3, 3, 3), itemsize)
    return seconds("wanvram.conv3d.default", (x, weight), Shaped((1, outputs, 2, 16, 16), itemsize), gpu)


def conv_flops(inputs: int, outputs: int) -> float:
    return 2 * inputs * 27 * outputs * 2 * 16 * 16


# --- rates -------------------------------------------------------------------------------------------------------------------


def test_every_rate_is_the_published_one_times_the_share_that_is_reached() -> None:
    assert product(2, of_share(product=0.5)) == pytest.approx(2 * 4000**3 / 0.5e12)
    assert product(4, of_share(product_fp32=0.5)) == pytest.approx(2 * 4000**3 / 0.5e11)
    assert product(1, of_share(product_fp8=0.5)) == pytest.approx(2 * 4000**3 / 2e12)
    assert scaled(of_share(product_fp8=0.5), 4000, 4000, 2000) == pytest.approx(4000 * 4000 * 4000 / 2e12)
    assert attended(4000, 4000, of_share(attention=0.5)) == pytest.approx(4 * 4000 * 128 * 4256 / 0.5e12)
    writes = Shaped((10**6,), 4)
    assert seconds("aten.zero_.default", (), writes, of_share(memory=0.5)) == pytest.approx(4e6 / 0.5e11)


def test_a_card_that_slows_down_under_load_computes_slower_and_moves_bytes_as_before() -> None:
    slowed = replace(CARD, sustained_mhz=CARD.sustained_mhz / 2)
    for itemsize in (1, 2, 4):
        assert product(itemsize, slowed) == pytest.approx(2 * product(itemsize, CARD))
    assert convolved(256, 256, slowed) == pytest.approx(2 * convolved(256, 256, CARD))
    assert seconds("aten.zero_.default", (), writes := Shaped((1000,)), slowed) == writes.nbytes / 1e11


def test_float32_without_matrix_units_is_never_faster_than_published() -> None:
    fast = replace(CARD, sustained_mhz=CARD.sustained_mhz * 1.5)
    assert product(4, fast) == product(4, CARD)
    assert product(2, fast) == pytest.approx(product(2, CARD) / 1.5)


def test_a_card_without_fp8_multiplies_it_as_fast_as_half() -> None:
    assert product(1, replace(CARD, fp8_flops=None)) == pytest.approx(product(2, CARD))


def test_float32_attention_runs_without_matrix_units() -> None:
    share = of_share(attention_fp32=0.5)
    assert attended(4000, 4000, share, itemsize=4) == pytest.approx(4 * 4000 * 128 * 4256 / 0.5e11)


def test_a_slower_backend_takes_its_own_pace_of_a_cards_rate() -> None:
    def asked(backend: str, gpu: GPU) -> float:
        q = Shaped((4000, 2, 64))
        return seconds("wanvram.attention_lse.default", (q, q, q, backend), q, gpu)

    assert asked("flash", CARD) == pytest.approx(asked("cudnn", CARD) / 0.63)


def test_few_keys_cost_as_much_as_256_more() -> None:
    assert attended(4000, 512, CARD) == pytest.approx(4 * 4000 * 128 * (512 + 256) / 1e12)


@pytest.mark.parametrize(("channels", "share"), [(96, 0.5), (127, 0.5), (128, 0.25), (256, 0.25)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_convolutions_of_fewer_than_128_channels_have_a_rate_of_their_own(
    channels: int, share: float, itemsize: int
) -> None:
    names = {2: ("conv_half_narrow", "conv_half"), 4: ("conv_tf32_narrow", "conv_tf32")}[itemsize]
    card = of_share(**dict(zip(names, (0.5, 0.25), strict=True)))
    padded = -(-channels // 32) * 32 / channels
    rate = {2: 1e12, 4: CARD.tf32_flops}[itemsize] * share
    assert convolved(channels, channels, card, itemsize) == pytest.approx(
        padded * conv_flops(channels, channels) / rate
    )


def test_three_channels_cost_as_much_as_32() -> None:
    assert convolved(96, 3, CARD) == pytest.approx(conv_flops(96, 32) / CARD.tf32_flops)


@pytest.mark.parametrize(("capability", "rate"), [((7, 5), 0.5e11), ((8, 0), 5e11), ((8, 6), 5e11)])
def test_ampere_is_the_first_with_tf32(capability: tuple[int, int], rate: float) -> None:
    card = replace(of_share(product_fp32=0.5), compute_capability=capability)
    assert convolved(256, 256, card) == pytest.approx(conv_flops(256, 256) / rate)


# --- traffic -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("itemsize", "out"), [(1, 2), (2, 2), (4, 4)])
def test_a_flat_product_is_bound_by_its_result_of_16_bits_or_more(itemsize: int, out: int) -> None:
    a, b = Shaped((3, 1000, 1), itemsize), Shaped((3, 1, 500), itemsize)
    moved = a.nbytes + b.nbytes + 3 * 1000 * 500 * out
    assert seconds("aten.bmm.default", (a, b), gpu=SLOW) == pytest.approx(moved / 1e6)


def test_a_flat_scaled_product_reads_bytes_and_writes_16_bits() -> None:
    assert scaled(SLOW, 1000, 2, 500) == pytest.approx((2000 + 1000 + 2 * 1000 * 500) / 1e6)


def test_attention_moves_queries_keys_values_and_the_result() -> None:
    assert attended(300, 100, SLOW) == pytest.approx((2 * 300 + 2 * 100) * 128 * 2 / 1e6)


def test_a_convolution_moves_picture_weight_and_result() -> None:
    moved = 4 * (16 * 4 * 256 + 8 * 16 * 27 + 8 * 2 * 256)
    assert convolved(16, 8, SLOW) == pytest.approx(moved / 1e6)


def test_the_first_convolution_of_each_shape_costs_the_host_a_plan_unless_all_are_known() -> None:
    clock, weight = Clock(GPUS["h200"], replace(HOST, operation_us=2 * HOST.operation_us)), Shaped((8, 16, 3, 3, 3))
    price = clock.costs.price("wanvram.conv3d.default")
    small, large = Shaped((1, 16, 3, 8, 8)), Shaped((1, 16, 3, 9, 8))

    def host_seconds(picture: Shaped) -> float:
        before = clock.now()
        clock.compute(price, (picture, weight), Shaped((1, 8, 1, 8, 8)))
        return clock.now() - before

    first, again, other = (host_seconds(picture) for picture in (small, small, large))
    assert (first, other) == pytest.approx((again + 2 * PLAN_SECONDS,) * 2), "a host that is half as fast"
    known = Clock(GPUS["h200"], clock.machine)
    known.leave_out_plans()
    clock = known
    assert host_seconds(small) == pytest.approx(again)


@pytest.mark.parametrize(
    ("operation", "args", "moved"),
    [
        ("aten.fill_.Scalar", (), 400),
        ("aten.arange.default", (), 400),
        ("aten.gather.default", (Shaped((10**6,)), 0, Shaped((100,), 8)), 800),
        ("aten.embedding.default", (Shaped((10**6, 4)),), 800),
        ("aten.copy_.default", (Shaped((100,), 4), Shaped((100,), 2)), 600),
        ("aten.addcmul.default", (Shaped((100,), 2), [Shaped((5,), 2), (Shaped((5,), 2),)], 3.0), 620),
        ("wanvram.gelu_tanh_.default", (Shaped((100,), 2),), 400),
    ],
)
def test_what_an_operation_moves_is_known_by_its_name(operation: str, args: tuple[Any, ...], moved: int) -> None:
    assert seconds(operation, args, Shaped((100,), 4), SLOW) == pytest.approx(moved / 1e6)


def test_a_window_is_read_and_written_and_its_newest_frame_once_more() -> None:
    frame = Shaped((1, 16, 1, 40, 10), 2)
    for window in (Shaped((1, 16, 3, 10, 10), 2), Shaped((1, 48, 10, 10), 2)):
        args = (frame, None, None, None, window)
        moved = window.nbytes * (2 + 1 / 3)
        assert seconds("wanvram.fill_window.default", args, None, SLOW) == pytest.approx(moved / 1e6)


@pytest.mark.parametrize(("add", "passes"), [(False, 2), (True, 3)])
def test_a_placed_frame_is_read_and_written_and_what_it_is_added_to_read_too(add: bool, passes: int) -> None:
    frame = Shaped((1, 16, 1, 10, 10), 4)
    args = (frame, None, Shaped(frame.shape, 4), add)
    moved = passes * frame.nbytes / 1e6
    assert seconds("wanvram.place_frame.default", args, None, SLOW) == pytest.approx(moved)


def test_allocations_have_no_price() -> None:
    costs = Costs(CARD)
    assert [costs.price(f"aten.{name}") for name in ("empty.memory_format", "new_empty.default", "set_.source")] == (
        [None] * 3
    )


# --- the host ----------------------------------------------------------------------------------------------------------------


ISSUED = of_share(dispatch_seconds=1.0, own_seconds=0.25, view_seconds=0.125, launch_seconds=0.5)


def test_our_own_operations_and_products_have_their_issue_and_a_host_of_half_the_speed_takes_twice_as_long() -> None:
    for host, times in ((HOST, 1.0), (replace(HOST, operation_us=2 * HOST.operation_us), 2.0)):
        costs = Costs(ISSUED, host)
        prices = [costs.price(name) for name in ("aten.add.Tensor", "wanvram.add_.default", "aten.mm.default")]
        assert [price.dispatch / times for price in prices if price] == [1.0, 0.25, 0.25]
        clock = Clock(ISSUED, host)
        clock.view()
        assert clock.now() == 0.125 * times


def test_between_kernels_the_device_takes_a_launch_that_is_counted_apart() -> None:
    clock = Clock(replace(ISSUED, efficiency=replace(ISSUED.efficiency, dispatch_seconds=0.0)), MACHINE)
    computing(clock, 2.0)
    computing(clock, 1.0)
    clock.synchronize()
    assert clock.now() == 2.0 + 1.0 + 2 * 0.5
    assert (clock.busy["elementwise"], clock.busy["launch"]) == (3.0, 1.0)


def test_an_operation_on_the_host_is_issued_and_then_computed_or_moved_there() -> None:
    machine = replace(MACHINE, flops=1e9, memory_bytes=1e6)
    clock = Clock(ISSUED, machine)
    add, mm = (clock.costs.price(name) for name in ("aten.add.Tensor", "aten.mm.default"))
    assert add is not None
    assert mm is not None
    x = Shaped((10**6,), 1)
    clock.compute_on_host(add, (x, x), x)
    assert clock.now() == pytest.approx(1.0 + 3.0)
    a = Shaped((1000, 1000))
    clock.compute_on_host(mm, (a, a), a)
    assert clock.now() == pytest.approx(4.0 + 0.25 + 6.0), "6 MB take longer than 2e9 operations"


def test_a_library_s_first_use_takes_longer_where_nothing_of_it_was_compiled() -> None:
    machine = replace(MACHINE, first_use={"a": FirstUse(5.0, 1.0), "b": FirstUse(7.0, 2.0)})
    clock = Clock(CARD, machine, cold=frozenset({"a", "c"}))
    clock.first_use("b")
    assert (clock.now(), clock.cold_seconds()) == (2.0, 0.0)
    clock.first_use("a")
    clock.first_use("c")
    assert (clock.now(), clock.cold_seconds()) == (2.0 + 5.0, 4.0)


def test_pinning_and_unpinning_take_the_host_their_bytes() -> None:
    clock = Clock(CARD, replace(MACHINE, pin_bytes=2e9, unpin_bytes=4e9))
    clock.pin(int(1e9))
    clock.unpin(int(1e9))
    assert clock.now() == 0.5 + 0.25


def test_frames_are_encoded_beside_everything_else_and_saving_waits_for_the_last() -> None:
    clock = Clock(CARD, replace(MACHINE, encode_pixels=1000.0))
    clock.encode(2000)
    clock.transfer(3 * SECOND, pinned=True)
    clock.encode(500)
    clock.encode(500)
    assert clock.now() == 3.0
    clock.finish_encoding()
    assert clock.now() == 3.0 + 1.0


# --- copies ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock(CARD, MACHINE)


def test_a_copy_within_the_device_is_read_and_written_at_its_bandwidth(clock: Clock) -> None:
    assert clock.prefetch(int(5e10), None, on_device=True) == pytest.approx(1.0)


def test_a_copy_back_follows_copies_back_and_its_mark_and_runs_beside_copies_there(clock: Clock) -> None:
    there = clock.prefetch(SECOND, None)
    assert [clock.write_back(SECOND, None), clock.write_back(SECOND, 5.0)] == [1.0, 6.0]
    assert (there, clock.copied) == (1.0, Copies(3 * SECOND, 3.0))
    clock.synchronize()
    assert (clock.now(), clock.copied.stalled_seconds) == (6.0, 6.0)


def test_a_copy_waits_for_the_last_of_its_marks_and_for_the_host(clock: Clock) -> None:
    assert clock.prefetch(SECOND, None, 3.0, 2.0) == 4.0
    clock.transfer(7 * SECOND, pinned=True)
    assert clock.prefetch(SECOND, None) == 8.0
    assert clock.copies_done() == 8.0
    assert clock.write_back(SECOND, None) == 8.0


def test_before_a_copy_that_is_still_read_others_pass_that_end_in_time(clock: Clock) -> None:
    clock.read_from_ram(int(8e9))  # 4 s
    late = clock.prefetch(SECOND, None)
    assert late == 5.0
    assert clock.prefetch(3 * SECOND, None) == 3.0
    assert clock.prefetch(SECOND // 2, 3.5) == 4.0, "to the very end of the gap"
    assert clock.prefetch(SECOND, None) == 6.0, "no room: behind"
    assert clock.copied == Copies(5 * SECOND + SECOND // 2, 5.5)


def test_what_was_read_long_before_its_copy_leaves_no_gap(clock: Clock) -> None:
    clock.read_from_ram(int(2e9))  # 1 s
    assert clock.prefetch(SECOND, 3.0) == 4.0
    assert clock.prefetch(SECOND // 2, None) == 4.5


def test_a_stall_of_less_than_a_second_is_one(clock: Clock) -> None:
    clock.wait(clock.prefetch(SECOND // 4, None))
    assert clock.copied.stalled_seconds == 0.25
    clock.wait(0.1)
    assert (clock.copied.stalled_seconds, clock.mark()) == (0.25, 0.25)


def test_a_copy_in_the_computation_s_order_holds_up_the_device_alone() -> None:
    clock = Clock(ISSUED, MACHINE)
    clock.queue_copy(SECOND)
    clock.queue_copy(SECOND)
    assert (clock.now(), clock.mark()) == (2.0, 3.0)


def test_the_host_waits_for_a_mark_and_computation_never_begins_before_it(clock: Clock) -> None:
    clock.host_waits(2.0)
    clock.host_waits(1.0)
    assert (clock.now(), clock.mark()) == (2.0, 2.0)
    computing(clock, 1.0)
    assert clock.mark() == 3.0


# --- other cards -------------------------------------------------------------------------------------------------------------


def test_each_other_card_takes_the_host_20_microseconds_whatever_is_sent() -> None:
    slow = replace(MACHINE, operation_us=2 * HOST.operation_us)
    for machine, times in ((MACHINE, 1), (slow, 2)):
        clock = Clock(CARD, machine, link=NVLINK)
        clock.start_exchange(0, 3)
        assert clock.now() == pytest.approx(3 * 20e-6 * times)
        clock.start_gather(0, 2, None)
        assert clock.now() == pytest.approx(5 * 20e-6 * times)


def test_an_exchange_follows_computation_and_exchanges_and_what_waits_stands_still() -> None:
    clock = Clock(CARD, MACHINE, link=NVLINK)
    computing(clock, 2.0)
    first, second = clock.start_exchange(SECOND, 0), clock.start_exchange(2 * SECOND, 0)
    assert (first, second) == (pytest.approx(3.0), pytest.approx(5.0))
    computing(clock, 0.5)
    clock.wait_for_exchange(first)
    clock.wait_for_exchange(1.0)
    assert (clock.exchange_stalls, clock.mark()) == (pytest.approx(0.5), pytest.approx(3.0))
    assert clock.exchanged_bytes == 3 * SECOND
    assert clock.copied == Copies()


def test_the_end_of_a_step_waits_for_weights_of_other_cards_and_over_nvlink_exchanges_do_not() -> None:
    clock = Clock(CARD, MACHINE, link=NVLINK)
    clock.transfer(SECOND, pinned=True)
    assert clock.start_gather(SECOND, 0, None) == pytest.approx(1.0 + 4.0), "from the host's moment on"
    assert clock.start_exchange(SECOND, 0) == pytest.approx(2.0)
    assert clock.start_gather(SECOND, 0, 9.0) == pytest.approx(13.0), "behind its mark"
    clock.synchronize()
    assert clock.now() == pytest.approx(13.0)


def test_over_a_bus_a_gather_follows_exchanges_and_holds_up_no_copy_that_ends_later() -> None:
    clock = Clock(CARD, MACHINE, link=BUS)
    clock.start_exchange(3 * SECOND, 0)
    clock.prefetch(9 * SECOND, None)
    assert clock.start_gather(SECOND, 0, None) == pytest.approx(4.0)
    assert clock.copies_done() == 9.0


def test_cards_of_which_nothing_is_said_have_the_link_that_two_of_them_usually_have() -> None:
    for card in (CARD, GPUS["rtx3090"]):
        clock, usual = Clock(card, MACHINE), link_of(card, None, 2)
        assert clock.start_exchange(SECOND, 0) == pytest.approx(usual.seconds(SECOND))
        assert clock.link == usual


# --- reading -----------------------------------------------------------------------------------------------------------------

FILES = replace(
    MACHINE, plain=Reading(taken=1e9, used=2e9), converted=Reading(taken=4e9, used=8e9), page_cache_bytes=1000.0
)


def test_files_are_read_from_the_disk_and_what_is_cached_of_them_from_ram() -> None:
    for share, wanted in ((0.0, 2.0), (1.0, 1.0), (0.5, 1.5)):
        clock = Clock(CARD, replace(FILES, cached_share=share))
        clock.load_from_disk(int(1e9), "dit")
        assert clock.now() == pytest.approx(wanted)
        assert clock.streamed_bytes("dit") == pytest.approx(1 / (share / 2e9 + (1 - share) / 5e8))


def test_a_fast_disk_gives_no_more_than_the_page_cache() -> None:
    clock = Clock(CARD, replace(FILES, disk_bytes=1e12))
    clock.load_from_disk(int(1e9), "dit")
    assert clock.now() == pytest.approx(1.0)


def test_converted_components_are_read_in_their_files_bytes() -> None:
    clock = Clock(CARD, replace(FILES, cached_share=1.0, stored={"dit": 2.0}))
    clock.load_from_disk(int(1e9), "dit")
    assert clock.now() == pytest.approx(2e9 / 4e9)
    assert clock.streamed_bytes("dit") == pytest.approx(8e9)


@pytest.mark.parametrize(("since", "read"), [(None, 2.0), (1001, 2.0), (1000, 0.5)])
def test_what_the_page_cache_just_holds_is_read_again_from_ram(since: int | None, read: float) -> None:
    clock = Clock(CARD, FILES)
    clock.read_from_disk(int(1e9), "dit", since)
    assert clock.prefetch(0, None) == pytest.approx(read)


def test_the_reading_thread_begins_when_the_host_asks_and_its_buffer_is_free(clock: Clock) -> None:
    clock.transfer(2 * SECOND, pinned=True)
    clock.read_from_ram(int(2e9))
    assert clock.prefetch(0, None) == 3.0
    clock.reader_waits(7.0)
    clock.reader_waits(4.0)
    clock.read_from_ram(int(2e9))
    assert clock.prefetch(0, None) == 8.0


# --- repeats -----------------------------------------------------------------------------------------------------------------


def test_a_stretch_that_repeats_moves_every_timeline_and_sum_by_as_much_each_time() -> None:
    """As three times the same work, one after the other: all of it is told apart by its size."""

    def work(clock: Clock) -> None:
        clock.read_from_ram(int(3e9))
        mark = clock.prefetch(2 * SECOND, None)
        computing(clock, 1.0)
        clock.wait(mark)
        clock.write_back(SECOND, clock.mark())
        exchanged = clock.start_exchange(SECOND, 1)
        clock.wait_for_exchange(exchanged)
        clock.start_gather(SECOND // 4, 1, None)
        clock.encode(10**7)
        clock.synchronize()

    played, advanced = (Clock(CARD, MACHINE, link=NVLINK) for _ in range(2))
    for clock in (played, advanced):
        work(clock)
    before, sums = advanced.timelines(), advanced.sums()
    work(advanced)
    moved = [now - then for now, then in zip(advanced.timelines(), before, strict=True)]
    more = [now - then for now, then in zip(advanced.sums(), sums, strict=True)]
    advanced.advance(2, moved, more)
    for _ in range(3):
        work(played)
    assert advanced.timelines() == pytest.approx(played.timelines())
    assert advanced.sums() == pytest.approx(played.sums())
    assert advanced.copied.nbytes == played.copied.nbytes == 4 * 3 * SECOND
    assert type(advanced.exchanged_bytes) is type(advanced.copied.nbytes) is int
    assert advanced.busy.keys() == played.busy.keys()


def test_numbers_have_no_bytes_and_tensors_in_lists_have() -> None:
    tensor = SimpleNamespace(nbytes=7)
    from wanvram.simulate.clock import nbytes_of

    assert nbytes_of((3, 2.5, None, tensor, [tensor, (tensor,)])) == 21

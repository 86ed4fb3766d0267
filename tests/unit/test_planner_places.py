"""Where weights wait and what fits, on forecasts of a few figures: placements, times of a run, budgets to the byte."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from planner_table import REQUEST, Table, trials_of
from wanvram.config import Measurement, Request, Strategy
from wanvram.errors import InputError
from wanvram.planner.budget import Budget, beyond_card, desktop_bytes, system_ram, usable_memory
from wanvram.planner.forecasts import (
    StageForecast,
    Trial,
    components_of,
    seconds_gained,
    situation,
    stage_seconds,
    steps_of,
    summed,
    total_seconds,
    vae_halves,
)
from wanvram.planner.placement import Placements, _from_disk, placements
from wanvram.simulate.gpus import find_gpu
from wanvram.units import GIB, MIB

BASE = Strategy(offload=True)
FULL, DISK, PINNED, PAGEABLE = "full", "disk", "pinned", "pageable"


def place(s: Strategy) -> str:
    return FULL if s.load_strategy == "full" else s.weights_in


def of(places: dict[str, Any], default: Any = 1.0) -> Any:
    """A figure of the transformer by where its weights are; of the decoder 10."""
    return lambda name, s: places.get(place(s), default) if name == "dit" else 10.0 if name == "vae_decoder" else 0.0


def large(*too_large: tuple[str, str]) -> Any:
    """Peaks beyond 100 bytes of (component, place); T5 on the host is a place of its own."""

    def peak(name: str, s: Strategy) -> int:
        where = "host" if s.t5_cpu and name == "text_encoder" else place(s)
        return 101 if (name, where) in too_large else 100

    return peak


def placed(table: Table, ram: int | None = None, disk_step: float = 20.0) -> Placements | None:
    """Steps take no time but from disk."""
    table.step = lambda name, s: disk_step if place(s) == DISK else 0.0
    return placements(trials_of(table, 100, ram), BASE)


def ways(found: Placements | None) -> list[tuple[str, bool]]:
    assert found is not None
    return [(place(way), way.t5_cpu) for way in found.found]


# --- placements --------------------------------------------------------------------------------------------------------------

NO_T5 = ("text_encoder", FULL)


def test_where_everything_fits_to_the_byte_nothing_else_is_looked_at() -> None:
    table = Table(peak=large(), seconds=of({FULL: 90.0}))
    assert placed(table) == Placements((BASE,), 100.0)
    assert {s for _, s in table.asked} == {BASE}


@pytest.mark.parametrize(("seconds", "alone"), [(91.0, True), (91.1, False)])
def test_streaming_from_disk_is_the_only_way_looked_at_where_it_takes_one_per_cent_more_at_most(
    seconds: float, alone: bool
) -> None:
    table = Table(peak=large(NO_T5), seconds=of({FULL: 90.0, DISK: seconds, PINNED: 90.5}))
    found = placed(table, disk_step=0.0)
    assert found is not None
    assert (ways(found)[0] == (DISK, False)) is alone
    assert (PINNED in {place(s) for _, s in table.asked}) is not alone
    assert found.fastest == (100.0 if alone else 90.0 + 10.0), "T5 on the host takes no time here"


def test_a_resident_transformer_beside_t5_on_the_host_is_a_way_of_its_own() -> None:
    found = placed(Table(peak=large(NO_T5), seconds=of({FULL: 90.0, DISK: 200.0, PINNED: 95.0})))
    assert ways(found) == [(PINNED, False), (FULL, True)]
    assert found is not None
    assert found.fastest == 100.0
    small = placed(
        Table(peak=large(NO_T5, ("text_encoder", "host")), seconds=of({FULL: 90.0, DISK: 200.0, PINNED: 95.0}))
    )
    assert ways(small) == [(PINNED, False)]
    no_room = placed(Table(peak=large(("dit", FULL)), seconds=of({FULL: 90.0, DISK: 200.0, PINNED: 95.0})))
    assert ways(no_room) == [(PINNED, False)], "the transformer is what does not fit"
    assert no_room is not None
    assert no_room.fastest == 105.0


def test_the_disk_is_no_third_way_where_the_fastest_is_not_streamed() -> None:
    def found(host_seconds: float) -> list[tuple[str, bool]]:
        seconds = of({FULL: 90.0, DISK: 200.0, PINNED: 95.0})
        table = Table(
            peak=large(NO_T5),
            seconds=lambda name, s: host_seconds if s.t5_cpu and name == "text_encoder" else seconds(name, s),
        )
        return ways(placed(table, disk_step=0.1))

    assert found(0.0) == [(PINNED, False), (FULL, True)]
    assert found(10.0) == [(PINNED, False), (FULL, True), (DISK, False)]


def test_nothing_that_fits_is_none() -> None:
    table = Table(peak=lambda name, s: 101 if name == "dit" else 1)
    assert placed(table) is None
    assert {place(s) for _, s in table.asked} == {FULL, DISK}, "what is too large from disk is so from RAM"
    t5 = large(*(("text_encoder", where) for where in (FULL, DISK, PINNED, PAGEABLE, "host")))
    assert placed(Table(peak=t5)) is None


def test_t5_computes_on_the_host_where_its_blocks_do_not_fit() -> None:
    peak = large(NO_T5, *(("text_encoder", where) for where in (DISK, PINNED, PAGEABLE)), ("dit", FULL))
    found = placed(Table(peak=peak, seconds=of({FULL: 90.0, DISK: 200.0, PINNED: 95.0})))
    assert ways(found) == [(PINNED, True)]


def test_weights_wait_in_the_first_home_that_holds_them_and_on_disk_where_none_does() -> None:
    times = of({FULL: 90.0, DISK: 200.0, PAGEABLE: 150.0, PINNED: 95.0})

    def host(*full: str) -> Any:
        return lambda name, s: 41 if place(s) in full and name == "dit" else 0

    peak = large(("dit", FULL))
    assert ways(placed(Table(peak=peak, seconds=times, host=host(PINNED)), 40)) == [(PAGEABLE, False)]
    assert ways(placed(Table(peak=peak, seconds=times, host=host(PINNED, PAGEABLE)), 40)) == [(DISK, False)]


def test_where_a_time_is_unknown_no_way_is_called_the_fastest() -> None:
    found = placed(Table(peak=large(NO_T5), seconds=of({FULL: 90.0, DISK: 200.0, PINNED: None})))
    assert ways(found) == [(PINNED, False), (FULL, True)]
    assert found is not None
    assert found.fastest is None
    unknown = placed(Table(peak=large(NO_T5), seconds=of({FULL: None, DISK: 1.0, PINNED: 1.0})))
    assert ways(unknown) == [(PINNED, False), (FULL, True)]


def test_the_fastest_way_from_disk_is_a_third_one_where_the_disk_may_keep_up() -> None:
    def found(disk: float) -> list[tuple[str, bool]]:
        steps = {FULL: 1.0, DISK: disk, PINNED: 1.0}
        table = Table(peak=large(("dit", FULL)), seconds=of({}, 90.0), step=lambda name, s: steps[place(s)])
        table.peak = lambda name, s: 101 if (name, place(s)) == ("dit", FULL) else 100
        return ways(placements(trials_of(table, 100), BASE))

    assert found(1.2) == [(PINNED, False), (DISK, False)]
    assert found(1.3) == [(PINNED, False)]


# --- the fastest way from disk -----------------------------------------------------------------------------------------------

FASTEST = Strategy(offload=True, load_strategy="block", resident_blocks=15)
PROBE = replace(FASTEST, weights_in=DISK, resident_blocks=0)


def thrifty(
    seconds: float, fastest: Strategy = FASTEST, probe: Strategy | None = PROBE, **figures: Any
) -> Strategy | None:
    """Steps take 3 s from disk and 1 s resident, ten of them: 20 s of waiting, half of that with half of the blocks resident."""
    steps = {FULL: 1.0, DISK: 3.0, PINNED: 1.0}
    table = Table(**({"step": lambda name, s: steps[place(s)], "peak": large()} | figures))
    seeded = replace(REQUEST, prompt="a", base_seed=1)
    return _from_disk(trials_of(table, 100, 40, request=seeded), fastest, probe, seconds)


def test_ten_seconds_of_waiting_are_hoped_to_be_made_up_in_a_run_of_five_hundred() -> None:
    assert thrifty(500.0) == replace(FASTEST, weights_in=DISK)
    assert thrifty(499.0) is None
    assert thrifty(999.0, replace(FASTEST, resident_blocks=0)) is None
    assert thrifty(1000.0, replace(FASTEST, resident_blocks=0)) == PROBE


def test_what_waits_falls_with_the_passes_over_the_weights_and_counts_for_all_videos() -> None:
    four = replace(FASTEST, batch_size=4)
    shared = replace(four, micro_batch_size=2)
    assert thrifty(500.0, four, replace(PROBE, batch_size=4)) == replace(four, weights_in=DISK)
    assert thrifty(499.0, four, replace(PROBE, batch_size=4)) is None
    assert thrifty(250.0, shared, replace(PROBE, batch_size=4)) == replace(shared, weights_in=DISK)
    assert thrifty(249.0, shared, replace(PROBE, batch_size=4)) is None


def test_the_disk_is_no_hope_where_nothing_fits_or_is_known_of_it_or_nothing_is_streamed() -> None:
    assert thrifty(1e9, probe=None) is None
    assert thrifty(1e9, Strategy(offload=True)) is None
    assert thrifty(1e9, replace(FASTEST, weights_in=DISK)) is None
    assert thrifty(1e9, step=lambda name, s: None if place(s) == FULL else 1.0) is None
    assert thrifty(1e9, step=lambda name, s: None if place(s) == DISK else 1.0) is None
    assert thrifty(1e9, peak=large(("dit", DISK))) is None
    assert thrifty(1e9, peak=large(("text_encoder", DISK))) is None
    assert thrifty(1e9, host=lambda name, s: 41) is None
    on_host = thrifty(1e9, probe=replace(PROBE, t5_cpu=True), peak=large(("text_encoder", DISK)))
    assert on_host == replace(FASTEST, weights_in=DISK, t5_cpu=True)


# --- times and parts of a run ------------------------------------------------------------------------------------------------


def stage(name: str, seconds: float | None, step: float | None = None, together: int = 1) -> StageForecast:
    return StageForecast(name, 1, 1, 1, 0, 0, step, seconds, together)


def test_the_time_of_a_stage_is_its_own_and_that_of_its_steps_and_unknown_if_either_is() -> None:
    assert stage_seconds(REQUEST, stage("vae_decoder", 3.0)) == 3.0
    assert stage_seconds(REQUEST, stage("dit", 3.0, 2.0)) == 23.0
    assert stage_seconds(REQUEST, stage("dit", None, 2.0)) is None
    assert stage_seconds(REQUEST, stage("dit", 3.0)) is None
    assert stage_seconds(REQUEST, stage("dit", 3.0, 2.0, together=2)) == 23.0, "of one prompt two seeds"
    prompts = replace(REQUEST, prompts=("a", "b", "c"))
    assert steps_of(prompts, 2) == 15.0
    assert total_seconds(prompts, [stage("dit", 3.0, 2.0, 2), stage("vae_decoder", 4.0)]) == 37.0


def test_a_sum_with_an_unknown_part_is_unknown_and_of_nothing_it_is_zero() -> None:
    assert (summed([1.0, 2.5]), summed([1.0, None]), summed([])) == (3.5, None, 0.0)
    now, then = [stage("vae_decoder", 5.0)], [stage("vae_decoder", 3.0)]
    assert seconds_gained(REQUEST, now, then) == 2.0
    assert seconds_gained(REQUEST, [stage("vae_decoder", None)], then) is None
    assert seconds_gained(REQUEST, now, [stage("vae_decoder", None)]) is None


def test_one_video_alone_advances_in_a_step_unless_more_are_said() -> None:
    assert StageForecast("dit", 1, 1, 1, 0, 0, 1.0, 1.0).together == 1


def test_the_components_are_those_of_the_task_in_the_order_of_their_stages() -> None:
    assert components_of(REQUEST) == ("text_encoder", "dit", "vae_decoder")
    assert components_of(Request.for_task("i2v-14B")) == (
        "text_encoder",
        "image_encoder",
        "vae_encoder",
        "dit",
        "vae_decoder",
    )
    assert (vae_halves(REQUEST), vae_halves(Request.for_task("i2v-14B"))) == (
        ("vae_decoder",),
        ("vae_encoder", "vae_decoder"),
    )


def test_a_situation_is_the_tokens_the_longer_side_and_the_streams() -> None:
    plain = situation(REQUEST)
    assert (plain.tokens, plain.edge, plain.half, plain.streams) == (21 * 30 * 52, 104, "bf16", 1)
    high = situation(Request.for_task("t2v-1.3B", size="480*832"), "fp16")
    assert (high.edge, high.half) == (104, "fp16")
    assert situation(Request.for_task("vace-1.3B")).streams == 2


# --- what fits ---------------------------------------------------------------------------------------------------------------


def test_the_last_byte_fits_and_one_more_is_a_trial_that_says_what_it_needed() -> None:
    trials = trials_of(Table(peak=lambda name, s: 100 if name == "dit" else 101, host=lambda name, s: 41), 100, ram=41)
    assert trials.fits(BASE, "dit")
    assert trials.failed == []
    assert not trials.fits(BASE, "vae_decoder")
    (trial,) = trials.failed
    assert trial == Trial("vae_decoder", BASE, "device", 101, 100, trials.of("vae_decoder", BASE))
    tight = trials_of(Table(host=lambda name, s: 41), 100, ram=40)
    assert not tight.fits(BASE, "dit", "vae_decoder")
    assert [(t.component, t.memory, t.needed, t.limit) for t in tight.failed] == [("dit", "host", 41, 40)]


def test_pinned_weights_are_held_to_three_quarters_of_ram_and_others_to_all_that_is_left() -> None:
    table = Table(host=lambda name, s: 14 * GIB)
    for strategy, name, fits in (
        (Strategy(), "dit", True),
        (Strategy(load_strategy="block"), "dit", False),
        (Strategy(load_strategy="block", weights_in="pageable"), "dit", True),
        (Strategy(load_strategy="block", t5_cpu=True), "text_encoder", True),
        (Strategy(load_strategy="block", t5_cpu=True), "dit", False),
    ):
        assert trials_of(table, 100, ram=15 * GIB).fits_host(name, strategy) is fits, (strategy, name)


def test_the_peak_and_the_ram_of_a_run_are_those_of_the_component_that_takes_most() -> None:
    sizes = {"text_encoder": 5, "dit": 9, "vae_decoder": 7}
    trials = trials_of(Table(peak=lambda name, s: sizes[name], host=lambda name, s: 10 * sizes[name]), 100)
    assert (trials.peak(BASE), trials.host(BASE), trials.seconds(BASE)) == (9, 90, 13.0)
    assert [found.component for found in trials.stages(BASE)] == [*sizes]


def test_a_forecast_is_asked_once_for_the_card_and_link_of_the_budget_and_without_spans_of_blocks() -> None:
    asked = []

    def forecast(config: Any, name: str) -> StageForecast:
        asked.append(config)
        return stage(name, 1.0, 1.0)

    trials = trials_of(Table(), 100)
    trials = replace(trials, budget=Budget(100, gpu="rtx3090", gpus=2, link="nvlink"), forecast=forecast)
    assert trials.known("dit", BASE) is None
    assert trials.of("dit", BASE) is trials.of("dit", replace(BASE, vae_tile=30)) is trials.known("dit", BASE)
    (config,) = asked
    assert (config.device, config.gpu, config.link, config.request) == ("simulated", "rtx3090", "nvlink", REQUEST)
    assert config.measurement == Measurement(profile_memory=False)
    assert trials.for_request(frame_num=5).request == replace(REQUEST, frame_num=5)


# --- budgets -----------------------------------------------------------------------------------------------------------------


def test_what_is_stated_is_the_card_within_three_per_cent_of_its_name() -> None:
    card = find_gpu("rtx4090")
    assert card.total_bytes < card.memory_bytes == 24 * GIB
    total, most = card.total_bytes, int(24 * GIB * 1.03)
    for stated, counts in (
        (total - 1, total - 1),
        (total, total),
        (total + 1, total),
        (most, total),
        (most + 1, most + 1),
    ):
        assert usable_memory(stated, card) == counts
    assert (beyond_card(total, card), beyond_card(most, card)) == (None, None)
    assert beyond_card(most + 1, card) == (
        "the NVIDIA GeForce RTX 4090 is known with 23.52 GiB; the 24.72 GiB that were stated count"
    )


def test_others_are_left_a_gibibyte_of_a_desktops_card_and_three_tenths_of_a_servers() -> None:
    assert (desktop_bytes(find_gpu("rtx4090")), desktop_bytes(find_gpu("h200"))) == (GIB, 322122547)
    assert [system_ram(n * GIB) // MIB for n in (16, 32, 40, 64)] == [4096, 4096, 5120, 8192]


def test_the_smallest_ram_holds_weights_process_and_system_exactly() -> None:
    plain = Budget(GIB)
    assert plain.smallest_ram(25 * GIB) == 32 * GIB, "an eighth of 32 is 4"
    assert plain.smallest_ram(GIB) == 8 * GIB
    assert plain.smallest_ram(53 * GIB) == 64 * GIB
    assert plain.smallest_ram(53 * GIB + 1) == math.ceil((56 * GIB + 1) * 8 / 7)
    assert Budget(GIB, system_bytes=GIB).smallest_ram(GIB) == 5 * GIB
    assert Budget(GIB, gpus=2).smallest_ram(GIB) == 11 * GIB, "two processes"


def test_the_margin_is_one_and_a_half_per_cent_and_64_mib_at_least_unless_it_is_stated() -> None:
    assert Budget(100 * GIB).margin == 1610612736
    assert Budget(10**9 + 1).margin == 64 * MIB
    assert Budget(8 * 10**9 + 1).margin == 120_000_001, "rounded up"
    assert (Budget(GIB, 5).margin, Budget(GIB, 5).device_limit) == (5, GIB - 5)
    assert Budget(GIB, 0).device_limit == GIB


@pytest.mark.parametrize(
    ("peak", "tenths"),
    [(1, 1), (GIB // 10 - 64 * MIB, 1), (GIB // 10 - 64 * MIB + 1, 2), (GIB - 64 * MIB, 10), (GIB, 11)],
)
def test_the_smallest_budget_is_in_tenths_of_a_gibibyte(peak: int, tenths: int) -> None:
    assert Budget(GIB).smallest_for(peak) == int(tenths * GIB / 10)


def test_a_budget_is_a_byte_at_least_and_its_ram_a_byte_more_than_the_process() -> None:
    assert (Budget(1).vram_bytes, Budget(1, 0).margin, Budget(1).gpus, Budget(1).card.key) == (1, 0, 1, "h200")
    for wrong, said in (
        ({"vram_bytes": 0}, "--vram: 0 bytes is no budget; write for example 8GiB"),
        ({"vram_bytes": 1, "margin_bytes": -1}, "margin: -1 is negative"),
        (
            {"vram_bytes": 1, "ram_bytes": 7 * GIB},
            "--ram: 7.00 GiB does not hold the process itself, which takes 3.00 GiB, beside 4.00 GiB kept for the system",
        ),
    ):
        with pytest.raises(InputError) as caught:
            Budget(**wrong)
        assert str(caught.value) == said
    assert Budget(1, ram_bytes=7 * GIB + 1).host_limit("disk") == 1
    assert (Budget(1).system, Budget(1).host_limit("pinned")) == (0, math.inf)
    assert Budget(1, ram_bytes=20 * GIB, system_bytes=GIB).host_limit("pinned") == 15 * GIB
    assert Budget(1, ram_bytes=20 * GIB, system_bytes=2 * GIB, gpus=2).host_limit("pinned") == 12 * GIB

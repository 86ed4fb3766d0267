"""The planner against forecasts made by hand: what it chooses, what it promises, what it says when nothing fits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner_card import Card, plan
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.planner.budget import PROCESS_BYTES, Budget, desktop_bytes, system_ram
from wanvram.planner.forecasts import StageForecast, Trials, choices, stage_seconds
from wanvram.planner.longest import most_frames
from wanvram.planner.placement import TIE
from wanvram.planner.result import Plan, Refusal
from wanvram.planner.search import Options, cleared, search
from wanvram.simulate.gpus import find_gpu
from wanvram.units import GIB, MIB, human, parse_bytes

FAST = 50e15  # operations per second: a card so fast that every step waits for copies


def request(task: str = "t2v-14B", size: str = "1280*720", **given: object) -> Request:
    return Request.for_task(task, size=size, **given)


def budget(gibibytes: float, ram: float | None = None, gpu: str = "h200") -> Budget:
    return Budget(int(gibibytes * GIB), ram_bytes=None if ram is None else int(ram * GIB), gpu=gpu)


def planned(*asked: object, gibibytes: float, ram: float | None = None, card: Card | None = None) -> Plan:
    return plan(request(*asked), budget(gibibytes, ram), Options(), card or Card())  # type: ignore[arg-type]


# --- several videos ----------------------------------------------------------------------------------------------------------

PICTURES = ("t2i-14B", "1280*720")  # copying a block takes longer than one picture's arithmetic


def planned_batch(
    gibibytes: float, *, task: tuple[str, str] = PICTURES, ram: float | None = None, **sizes: int
) -> Plan:
    asked = Request.for_task(task[0], size=task[1])
    return plan(asked, budget(gibibytes, ram), Options(Strategy(**sizes)), Card(copy_rate=12e9))  # type: ignore[arg-type]


def test_videos_share_a_pass_over_the_weights_as_far_as_a_step_waits_for_them() -> None:
    one, four = planned_batch(6), planned_batch(6, batch_size=4)
    assert four.strategy.batch_size == 4
    assert (four.strategy.micro_batch_size or 1) > 1
    assert four.seconds_per_step is not None
    assert one.seconds_per_step is not None
    assert four.seconds_per_step / 4 < 0.5 * one.seconds_per_step


def test_videos_whose_arithmetic_hides_the_copies_share_no_pass() -> None:
    result = planned_batch(20, task=("t2v-14B", "1280*720"), batch_size=3)
    assert result.strategy.micro_batch_size is None
    assert result.strategy.cfg == "sequential"


def test_blocks_on_disk_are_read_for_several_videos_at_once() -> None:
    result = planned_batch(8, ram=20, batch_size=8)
    assert result.strategy.weights_in == "disk"
    assert (result.strategy.micro_batch_size or 1) > 1


@pytest.mark.parametrize("given", [1, 2, 4])
def test_a_micro_batch_size_that_was_given_is_kept(given: int) -> None:
    assert planned_batch(6, batch_size=4, micro_batch_size=given).strategy.micro_batch_size == given


def test_the_time_of_a_plan_is_that_of_all_its_videos() -> None:
    asked = Request.for_task("t2i-14B", prompts=tuple("abcde"), sample_steps=10)
    result = plan(asked, budget(80), Options(Strategy(batch_size=2)), Card())
    (dit,) = [stage for stage in result.stages if stage.component == "dit"]
    assert dit.seconds_per_step is not None
    assert stage_seconds(asked, dit) == pytest.approx(8.0 + dit.seconds_per_step * 10 * 2.5)
    assert result.to_json()["strategy"]["batch_size"] == 2


def test_without_guidance_no_plan_joins_two_passes_of_which_there_is_one() -> None:
    card = Card(flops=FAST)
    result = plan(request(sample_guide_scale=1.0), budget(16), Options(), card)
    assert result.strategy.cfg == "sequential"
    assert all(strategy.cfg == "sequential" for _, strategy, _ in card.calls)
    guided = plan(request(), budget(16), Options(), card)
    assert guided.strategy.cfg == "joint"


# --- what is chosen ----------------------------------------------------------------------------------------------------------


def test_with_room_for_everything_nothing_is_streamed_sliced_or_tiled() -> None:
    card = Card()
    result = planned(gibibytes=80, card=card)
    assert result.strategy == Strategy(offload=True)
    assert not result.rejected
    assert len(card.calls) <= 5  # three components and two lossy offers


def test_a_step_that_waits_for_copies_has_as_many_resident_blocks_as_fit() -> None:
    card = Card(flops=FAST)
    result = planned(gibibytes=16, card=card)
    assert result.strategy.load_strategy == "block"
    one_more = replace(result.strategy, resident_blocks=result.strategy.resident_blocks + 1)
    config = RunConfig("x", "", "simulated", result.request, one_more)
    assert result.strategy.resident_blocks > 0
    assert card(config, "dit").peak_device_bytes > result.budget.device_limit


def test_blocks_of_different_sizes_still_end_on_a_number_that_was_forecast_to_fit() -> None:
    class Uneven(Card):
        """The first ten blocks weigh twice as much."""

        def dit(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
            base, extra, host, seconds = super().dit(request, s)
            more = min(s.resident_blocks if s.load_strategy == "block" else 40, 10)
            return base + more * self.block_bytes(request, s), extra, host, seconds

    result = planned(gibibytes=16, card=Uneven(flops=FAST))
    one_more = replace(result.strategy, resident_blocks=result.strategy.resident_blocks + 1)
    config = RunConfig("x", "", "simulated", result.request, one_more)
    assert result.peak_device_bytes <= result.budget.device_limit
    assert Uneven(flops=FAST)(config, "dit").peak_device_bytes > result.budget.device_limit


def test_a_resident_transformer_does_not_wait_for_a_text_encoder_that_does_not_fit() -> None:
    result = planned("t2v-1.3B", "832*480", gibibytes=8)
    assert result.strategy.load_strategy == "block"
    stages = {stage.component: stage.peak_device_bytes for stage in result.stages}
    assert result.strategy.resident_blocks > 20, "blocks that stay below the peak of decoding cost nothing"
    assert stages["dit"] <= stages["vae_decoder"] == result.peak_device_bytes
    assert ("text_encoder", {"load_strategy": "full"}) in [(r.component, r.change) for r in result.rejected]


@pytest.mark.parametrize(("gibibytes", "tiled"), [(40, False), (6, True)])
def test_the_vae_is_tiled_when_whole_frames_do_not_fit(gibibytes: float, tiled: bool) -> None:
    result = planned(gibibytes=gibibytes)
    assert (result.strategy.vae_tile is not None) is tiled
    tile_rejected = [r.change for r in result.rejected if r.component == "vae_decoder"]
    assert ({"vae_tile": None} in tile_rejected) is tiled


def test_the_largest_tile_that_fits_is_taken_for_both_halves_of_the_vae() -> None:
    class HungryEncoder(Card):
        def __call__(self, config: RunConfig, component: str) -> StageForecast:
            forecast = super().__call__(config, component)
            more = 5 * GIB if component == "vae_encoder" and (config.strategy.vae_tile or 99) > 30 else 0
            return replace(forecast, peak_device_bytes=forecast.peak_device_bytes + more)

    strategies = [planned("i2v-14B", gibibytes=6, card=card).strategy.vae_tile for card in (Card(), HungryEncoder())]
    assert strategies[0] is not None
    assert strategies[0] > 30
    assert strategies[1] == 30


def test_attention_is_sliced_when_that_makes_it_fit() -> None:
    roomy, tight = planned(gibibytes=8), planned(gibibytes=6.5)
    assert not roomy.strategy.attention_slicing
    assert tight.strategy.attention_slicing
    assert {"attention_slicing": False} in [r.change for r in tight.rejected if r.component == "dit"]


@pytest.mark.parametrize(
    ("ram", "home"), [(None, "pinned"), (64, "pinned"), (34, "pageable"), (24, "disk"), (9, "disk")]
)
def test_weights_wait_in_the_fastest_memory_that_holds_them(ram: float | None, home: str) -> None:
    result = planned(gibibytes=6, ram=ram, card=Card(flops=FAST))
    assert result.strategy.weights_in == home
    assert ram is None or result.host_bytes <= ram * GIB - system_ram(int(ram * GIB))
    refused = [r.change.get("weights_in") for r in result.rejected if r.memory == "host"]
    assert ("pinned" in refused) is (home != "pinned")


def test_both_guidance_passes_share_a_streamed_block_only_when_copies_are_the_bottleneck() -> None:
    slow_copies, fast_copies = Card(copy_rate=6e9), Card()
    assert planned("t2v-14B", "832*480", gibibytes=8, card=slow_copies).strategy.cfg == "joint"
    assert planned("t2v-14B", "832*480", gibibytes=8, card=fast_copies).strategy.cfg == "sequential"


def test_t5_computes_on_the_host_only_when_its_blocks_do_not_fit() -> None:
    class LargeLayers(Card):
        def text_encoder(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
            base, extra, host, seconds = super().text_encoder(request, s)
            return 6 * base, extra, host, seconds

    assert not planned("t2v-1.3B", "832*480", gibibytes=4).strategy.t5_cpu
    assert planned("t2v-1.3B", "832*480", gibibytes=4, card=LargeLayers()).strategy.t5_cpu


def test_a_resident_transformer_beside_t5_on_the_host_wins_when_streaming_t5_is_slower() -> None:
    crawling = planned("t2v-1.3B", "832*480", gibibytes=8, card=Card(copy_rate=0.3e9))
    assert crawling.strategy == Strategy(offload=True, t5_cpu=True)


@pytest.mark.parametrize("gibibytes", [6, 8, 16, 24, 80])
def test_an_ordinary_plan_needs_at_most_twelve_forecasts_and_asks_nothing_twice(gibibytes: float) -> None:
    card = Card()
    planned(gibibytes=gibibytes, ram=64, card=card)
    asked = [choices(name, s) for name, s, _ in card.calls]
    assert len(asked) <= 12
    assert len(set(asked)) == len(asked)


def test_unknown_times_are_said_and_the_least_aggressive_strategy_that_fits_is_taken() -> None:
    result = planned(gibibytes=12, card=Card(timed=False))
    assert (result.seconds, result.seconds_per_step) == (None, None)
    assert (result.strategy.weights_in, result.strategy.attention_slicing) == ("pinned", False)
    assert result.strategy.resident_blocks > 0
    assert any("times are unknown" in note for note in result.notes)
    assert all(r.seconds_gained is None for r in result.rejected)


def test_the_total_is_the_sum_of_the_stages_with_every_step_of_every_prompt() -> None:
    one = plan(request(sample_steps=10), budget(80), Options(), Card())
    two = plan(request(sample_steps=10, prompts=("a", "b")), budget(80), Options(), Card())
    step = one.seconds_per_step
    assert step is not None
    others = sum(stage.seconds or 0.0 for stage in one.stages)
    assert one.seconds == pytest.approx(others + 10 * step)
    assert two.seconds == pytest.approx(others + 20 * step)


# --- what is equally fast ----------------------------------------------------------------------------------------------------


def test_within_one_per_cent_of_the_time_the_plan_with_less_ram_is_taken_and_the_trade_is_shown() -> None:
    slow = Card(flops=20e12)  # arithmetic so slow that the disk keeps up
    result = planned("i2v-14B", "832*480", gibibytes=8, ram=32, card=slow)
    assert result.strategy.weights_in == "disk"
    assert result.host_bytes < 8 * GIB
    roomy = planned("i2v-14B", "832*480", gibibytes=8, ram=64, card=slow)
    assert roomy.strategy == result.strategy
    (trade,) = [trade for trade in roomy.trades if trade.change == {"weights_in": "pinned"}]
    assert trade.host_more_bytes > 20 * GIB
    assert roomy.seconds is not None
    assert 0 < trade.seconds_gained <= TIE * roomy.seconds


def test_within_one_per_cent_of_the_time_the_plan_with_less_device_memory_is_taken() -> None:
    class LargeFrames(Card):
        def vae(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
            base, extra, host, seconds = super().vae(request, s)
            return base, 2 * extra, host, seconds

    result = plan(request(sample_steps=200), budget(20), Options(), LargeFrames())
    assert (result.strategy.load_strategy, result.strategy.resident_blocks) == ("block", 0)
    assert result.strategy.vae_tile is not None, "whole frames would fit, but are the only thing that needs so much"
    assert result.peak_device_bytes < 10 * GIB
    (trade,) = [trade for trade in result.trades if trade.change == {"vae_tile": None}]
    assert trade.device_more_bytes > 4 * GIB
    assert trade.seconds_gained > 0


def test_where_the_disk_does_not_keep_up_the_ram_is_used_though_less_would_do() -> None:
    result = planned(gibibytes=8, ram=64, card=Card(flops=FAST))
    assert result.strategy.weights_in == "pinned"
    fastest = [r for r in result.trades if r.seconds_gained > TIE * (result.seconds or 0)]
    assert fastest == []


# --- RAM and cards as stated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ram", "kept"), [(16, 4), (32, 4), (64, 8), (256, 32)])
def test_an_eighth_of_the_ram_and_at_least_4_gib_are_kept_for_the_system(ram: int, kept: int) -> None:
    assert budget(8, ram=ram).system == kept * GIB
    assert budget(8, ram=ram).host_limit("pageable") == (ram - kept) * GIB - PROCESS_BYTES


def test_memory_beyond_the_card_s_name_counts_and_the_driver_s_share_of_its_name_does_not() -> None:
    card = find_gpu("rtx4090")
    named = Budget(24 * GIB, gpu="rtx4090")
    assert named.usable_bytes == card.total_bytes < 24 * GIB
    assert Budget(48 * GIB, gpu="rtx4090").usable_bytes == 48 * GIB
    assert Budget(20 * GIB, gpu="rtx4090").usable_bytes == 20 * GIB
    result = plan(request(), Budget(48 * GIB, gpu="rtx4090"), Options(offers=False), Card())
    assert any("known with 23.52 GiB; the 48.00 GiB that were stated count" in note for note in result.notes)


def test_a_desktop_s_share_is_left_on_consumer_cards() -> None:
    assert desktop_bytes(find_gpu("rtx4090")) == GIB
    assert desktop_bytes(find_gpu("h200")) < GIB // 2


# --- the most frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gibibytes", [4.5, 6, 9])
def test_the_most_frames_that_fit_fit_and_four_more_do_not(gibibytes: float) -> None:
    card = Card()
    trials = Trials(request(), budget(gibibytes), card)
    frames = most_frames(trials, Strategy(offload=True))
    assert frames is not None
    assert len({asked.frame_num for _, _, asked in card.calls}) <= 8
    assert isinstance(search(request(frame_num=frames), budget(gibibytes), Options(), Card()), Plan)
    assert isinstance(search(request(frame_num=frames + 4), budget(gibibytes), Options(), Card()), Refusal)


def test_no_number_of_frames_is_named_where_none_fits_nor_more_than_a_video_may_have() -> None:
    assert most_frames(Trials(request(), budget(1.5), Card()), Strategy()) is None
    assert most_frames(Trials(request("t2v-1.3B", "832*480"), budget(140), Card()), Strategy()) == 4093


# --- what is said about the rest ---------------------------------------------------------------------------------------------


def test_a_rejected_way_says_what_it_needs_what_is_allowed_and_what_it_would_save() -> None:
    result = planned(gibibytes=6, card=Card(copy_rate=6e9))
    whole = next(r for r in result.rejected if r.change.get("load_strategy") == "full")
    assert whole.component == "dit"
    assert whole.needed_bytes > whole.limit_bytes == result.budget.device_limit
    assert whole.seconds_gained is not None
    assert whole.seconds_gained > 0


def test_a_way_that_would_gain_nothing_is_not_listed_as_rejected() -> None:
    class AlwaysAsFast(Card):
        def __call__(self, config: RunConfig, component: str) -> StageForecast:
            forecast = super().__call__(config, component)
            return replace(forecast, seconds=1.0, seconds_per_step=1.0)

    result = planned(gibibytes=6, card=AlwaysAsFast())
    assert result.strategy.load_strategy == "block"
    assert result.rejected == ()


def test_lossy_knobs_are_offered_with_their_savings_and_never_chosen() -> None:
    result = planned(gibibytes=6)
    assert (result.strategy.weight_storage, result.strategy.vae_precision) == ("same", "fp32")
    offers = {next(iter(o.change.items())): o for o in result.offers}
    assert set(offers) == {("weight_storage", "fp8"), ("vae_precision", "bf16")}
    assert offers["weight_storage", "fp8"].device_saved_bytes > 0
    assert offers["vae_precision", "bf16"].device_saved_bytes > 0


def test_a_lossy_knob_that_changes_neither_memory_nor_time_is_not_offered() -> None:
    class AlreadyIn8Bits(Card):
        def __call__(self, config: RunConfig, component: str) -> StageForecast:
            strategy = replace(config.strategy, weight_storage="fp8") if component == "dit" else config.strategy
            return super().__call__(replace(config, strategy=strategy), component)

    result = planned(gibibytes=6, card=AlreadyIn8Bits())
    assert [list(offer.change) for offer in result.offers] == [["vae_precision"]]


def test_an_offer_for_the_vae_counts_both_of_its_halves() -> None:
    class HungryEncoder(Card):
        """The encoder takes twice what the decoder does."""

        def __call__(self, config: RunConfig, component: str) -> StageForecast:
            forecast = super().__call__(config, component)
            factor = 2 if component == "vae_encoder" else 1
            return replace(forecast, peak_device_bytes=factor * forecast.peak_device_bytes)

    result = planned("i2v-14B", "832*480", gibibytes=40, card=HungryEncoder())
    offer = next(o for o in result.offers if "vae_precision" in o.change)
    peaks = {stage.component: stage.peak_device_bytes for stage in result.stages}
    half = replace(result.strategy, vae_precision="bf16")
    lossy = HungryEncoder()(RunConfig("x", "", "simulated", result.request, half), "vae_encoder")
    assert offer.device_saved_bytes == peaks["vae_encoder"] - lossy.peak_device_bytes > 0


def test_what_only_fits_beside_no_page_tables_is_planned_from_another_home_than_pinned_ram() -> None:
    """Seen on an H200: vace-14B in the 2.30 GiB that its own refusal had named was refused for host RAM, of which there was plenty."""

    class WithPageTables(Card):
        def __call__(self, config: RunConfig, component: str) -> StageForecast:
            forecast = super().__call__(config, component)
            block = config.strategy.load_strategy == "block" and component == "dit"
            # More than a tenth of a GiB, to which budgets are rounded.
            pinned = 128 * MIB if block and config.strategy.weights_in == "pinned" else 0
            return replace(forecast, peak_device_bytes=forecast.peak_device_bytes + pinned)

    refused = search(request(), budget(2), Options(), WithPageTables())
    assert isinstance(refused, Refusal)
    assert refused.component == "dit"
    again = plan(request(), Budget(refused.smallest_bytes, gpu="h200"), Options(), WithPageTables())
    assert again.strategy.weights_in != "pinned"


def test_fp32_is_kept_and_half_precision_offered_as_the_card_has_it() -> None:
    asked = Options(Strategy(precision="fp32"))
    result = plan(request(), budget(15, gpu="t4"), asked, Card())
    assert result.strategy.precision == "fp32"
    assert {"precision": "fp16"} in [o.change for o in result.offers]
    assert {"vae_precision": "fp16"} in [o.change for o in result.offers]


def test_a_lossy_knob_that_the_user_fixed_is_kept_and_named() -> None:
    result = plan(request(), budget(12), Options(Strategy(weight_storage="fp8"), offers=False), Card())
    assert result.strategy.weight_storage == "fp8"
    assert any("weight_storage fp8 is lossy" in note for note in result.notes)
    assert not result.offers


def test_a_card_nobody_measured_and_a_budget_above_it_are_noted() -> None:
    result = plan(request("t2v-1.3B", "832*480"), budget(8, gpu="rtx4060"), Options(), Card())
    assert result.budget.usable_bytes < 8 * GIB
    assert any("not measured on this card" in note for note in result.notes)
    assert any("8,028.2 MiB" in note for note in result.notes)
    assert not any("not measured" in note for note in planned(gibibytes=8).notes)


# --- nothing fits ------------------------------------------------------------------------------------------------------------


def refused(*asked: object, gibibytes: float, ram: float | None = None) -> Refusal:
    result = search(request(*asked), budget(gibibytes, ram), Options(), Card())  # type: ignore[arg-type]
    assert isinstance(result, Refusal)
    return result


def test_where_nothing_fits_the_smallest_budget_is_named_and_it_is_the_smallest() -> None:
    refusal = refused(gibibytes=3)
    assert f"{refusal.smallest_bytes / GIB:.2f} GiB" in refusal.message
    assert planned(gibibytes=refusal.smallest_bytes / GIB).peak_device_bytes <= refusal.smallest_bytes
    assert isinstance(search(request(), budget(refusal.smallest_bytes / GIB - 0.11), Options(), Card()), Refusal)


def test_smaller_sizes_and_fewer_frames_that_fit_are_named_and_do_fit() -> None:
    refusal = refused(gibibytes=3.4)
    assert [(a.size, a.frame_num != 81) for a in refusal.alternatives] == [("832*480", False), ("1280*720", True)]
    assert "--size 832*480" in refusal.message
    assert all(command.startswith("wanvram plan --task t2v-14B --size ") for command in refusal.commands)
    assert len(refusal.commands) == 2
    for other in refusal.alternatives:
        result = plan(request(size=other.size, frame_num=other.frame_num), budget(3.4), Options(), Card())
        assert result.peak_device_bytes <= result.budget.device_limit
    fewer = refusal.alternatives[1]
    more = request(frame_num=fewer.frame_num + 4)
    assert isinstance(search(more, budget(3.4), Options(), Card()), Refusal)


def test_fewer_frames_of_a_smaller_size_are_tried_last() -> None:
    refusal = refused(gibibytes=2.6)  # one frame of 1280*720 needs more
    assert [a.size for a in refusal.alternatives] == ["832*480"]
    assert refusal.alternatives[0].frame_num < 81
    assert f"--size 832*480 --frame_num {refusal.alternatives[0].frame_num}" in refusal.message


def test_a_budget_no_request_could_meet_offers_no_change() -> None:
    refusal = refused(gibibytes=0.5)
    assert refusal.alternatives == ()
    assert "would fit" not in refusal.message


@pytest.mark.parametrize("ram", [8.6, 9.5, 64])
def test_the_smallest_budget_is_one_within_the_host_ram_that_was_given(ram: float) -> None:
    refusal = refused(gibibytes=1, ram=ram)
    assert refusal.memory == "device"
    assert f"that {human(int(ram * GIB))} of host RAM allow" in refusal.message
    strategy = planned(gibibytes=refusal.smallest_bytes / GIB, ram=ram).strategy
    assert strategy.residual_in == ("pinned" if ram == 64 else "device"), "a stream in RAM needs RAM"


def test_the_most_frames_are_those_that_host_ram_holds_too() -> None:
    def most(ram: float | None) -> int:
        trials = Trials(request(), budget(4, ram), Card())
        return most_frames(trials, cleared(Strategy())) or 0

    scarce, plenty = most(8.6), most(64)
    assert 0 < scarce < plenty
    assert isinstance(search(request(frame_num=scarce), budget(4, 8.6), Options(), Card()), Plan)


def test_a_need_beyond_the_card_is_said() -> None:
    huge = Card()
    huge.vae = lambda request, s: (9 * GIB, 9 * GIB, 0, 1.0)  # type: ignore[method-assign]
    refusal = search(request("t2v-1.3B", "832*480"), budget(8, gpu="rtx4060"), Options(), huge)
    assert isinstance(refusal, Refusal)
    assert "more than the NVIDIA GeForce RTX 4060 8GB has" in refusal.message


def test_too_little_host_ram_is_named_as_such() -> None:
    class NoDisk(Card):
        """Even from disk, everything is held in RAM."""

        def text_encoder(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
            base, extra, _, seconds = super().text_encoder(request, s)
            return base, extra, 10600 * MIB, seconds

    refusal = search(request(), budget(6, ram=9), Options(), NoDisk())
    assert isinstance(refusal, Refusal)
    assert (refusal.memory, refusal.component) == ("host", "text_encoder")
    enough = Budget(6 * GIB, ram_bytes=refusal.smallest_bytes)
    assert refusal.smallest_bytes == enough.system + 10600 * MIB + PROCESS_BYTES
    assert isinstance(search(request(), enough, Options(), NoDisk()), Plan)
    assert "host RAM" in refusal.message


@given(peak=st.integers(1, 200 * GIB))
def test_the_smallest_budget_can_be_typed_as_it_is_printed(peak: int) -> None:
    smallest = Budget(GIB).smallest_for(peak)
    typed = Budget(parse_bytes(f"{smallest / GIB:.1f}GiB"), gpu="h200")
    assert typed.vram_bytes == smallest
    assert smallest - Budget(1)._margin_of(smallest) >= peak > smallest - GIB // 10 - Budget(1)._margin_of(smallest) - 2


@pytest.mark.parametrize(
    "wrong", [{"vram_bytes": 0}, {"vram_bytes": GIB, "ram_bytes": GIB}, {"vram_bytes": GIB, "gpu": "x"}]
)
def test_an_impossible_budget_is_bad_input(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Budget(**wrong)  # type: ignore[arg-type]


def test_the_planner_loads_without_torch() -> None:
    code = "import sys, wanvram.planner, wanvram.report.plan, wanvram.cli.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""The planner's choice among the ways in which several GPUs can share a video, against forecasts made by hand."""

from __future__ import annotations

import pytest

from planner_card import Card, plan
from wanvram.config import Request, Strategy
from wanvram.errors import InputError
from wanvram.planner.budget import PROCESS_BYTES, Budget
from wanvram.planner.result import Plan, Refusal
from wanvram.planner.search import Options, search
from wanvram.planner.sizes import sizes_for
from wanvram.units import GIB


def request(task: str = "t2v-14B", size: str = "1280*720", **given: object) -> Request:
    return Request.for_task(task, size=size, **given)


SMALL = request(size="832*480")  # reading it from disk takes longer than its arithmetic


def budget(gibibytes: float, gpus: int = 2, ram: float | None = None, gpu: str = "h200") -> Budget:
    return Budget(int(gibibytes * GIB), ram_bytes=None if ram is None else int(ram * GIB), gpu=gpu, gpus=gpus)


def planned(asked: Request, limits: Budget, base: Strategy | None = None, card: Card | None = None) -> Plan:
    return plan(asked, limits, Options(base or Strategy(), offers=False), card or Card())


def sizes(result: Plan) -> tuple[int, int, int]:
    return result.strategy.cfg_size, result.strategy.ring_size, result.strategy.ulysses_size


def test_with_room_for_everything_two_gpus_take_a_guidance_pass_each_and_keep_whole_weights() -> None:
    result = planned(request(), budget(80))
    assert sizes(result) == (2, 1, 1)
    assert (result.strategy.load_strategy, result.strategy.dit_fsdp) == ("full", False)
    assert [layout.verdict for layout in result.layouts if layout.verdict == "chosen"] == ["chosen"]
    one = planned(request(), budget(80, gpus=1))
    assert one.layouts == ()
    assert result.seconds_per_step == pytest.approx((one.seconds_per_step or 0) / 2)


def test_without_guidance_they_share_the_sequence() -> None:
    result = planned(request(sample_guide_scale=1.0), budget(80))
    assert sizes(result)[0] == 1
    assert {layout.sizes["cfg_size"] for layout in result.layouts} == {1}


def test_a_budget_below_one_gpu_s_activations_is_kept_by_sharing_rows() -> None:
    asked = request()
    alone = planned(asked, budget(5.2, gpus=1))
    assert alone.strategy.residual_in == "pinned"
    result = planned(asked, budget(5.2))
    assert sizes(result) == (1, 1, 2)
    assert result.peak_device_bytes <= budget(5.2).device_limit
    too_large = next(layout for layout in result.layouts if layout.sizes["cfg_size"] == 2)
    assert too_large.verdict == "too large"
    assert (too_large.peak_device_bytes or 0) > budget(5.2).device_limit


def test_ram_that_holds_the_weights_once_is_enough_where_they_are_shared() -> None:
    plenty, scarce = (planned(SMALL, budget(6, ram=ram)) for ram in (200, 48))
    assert scarce.strategy.dit_fsdp
    assert scarce.strategy.weights_in == "pinned"
    assert scarce.host_bytes < 40 * GIB
    for result in (plenty, scarce):
        assert result.host_bytes <= (result.budget.ram_bytes or 0) - result.budget.system


def test_of_ways_that_are_equally_fast_the_one_with_less_host_ram_is_taken() -> None:
    result = planned(SMALL, budget(6, ram=200))
    assert result.strategy.dit_fsdp
    whole = next(layout for layout in result.layouts if layout.verdict == "fits" and not layout.sizes["dit_fsdp"])
    chosen = next(layout for layout in result.layouts if layout.verdict == "chosen")
    assert (whole.host_bytes or 0) > 1.5 * (chosen.host_bytes or 0)


def test_every_process_counts_in_the_hosts_ram() -> None:
    two = planned(request("t2v-1.3B", "832*480"), budget(20))
    assert two.host_bytes >= 2 * PROCESS_BYTES


@pytest.mark.parametrize(("asked", "expected"), [({"ulysses_size": 2}, (1, 1, 2)), ({"ring_size": 2}, (1, 2, 1))])
def test_sizes_that_were_given_are_kept(asked: dict[str, int], expected: tuple[int, int, int]) -> None:
    result = planned(request(), budget(80), Strategy(**asked))  # type: ignore[arg-type]
    assert sizes(result) == expected
    assert len(result.layouts) == 1


def test_sizes_for_another_number_of_gpus_are_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="share the work of 2 GPUs, and 4 were asked for"):
        planned(request(), budget(80, gpus=4), Strategy(ulysses_size=2))


def test_every_product_of_eight_is_a_way_and_the_fastest_is_looked_at_first() -> None:
    ways = sizes_for(request(), budget(80, gpus=8), Strategy())
    assert len(ways) == 7
    assert all(way.count == 8 for way in ways)
    assert (ways[0].cfg, ways[0].ring, ways[0].ulysses) == (2, 1, 4)
    assert ways[0].expected_seconds <= 1.03 * min(way.expected_seconds for way in ways)
    few_heads = sizes_for(request("t2v-1.3B", "832*480"), budget(80, gpus=8), Strategy())
    assert (few_heads[0].cfg, few_heads[0].ulysses * few_heads[0].ring) == (2, 4)
    uneven = next(way for way in few_heads if way.ulysses == 8)  # 12 heads: some ranks have two, some one
    assert uneven.expected_seconds > 1.15 * few_heads[0].expected_seconds


def test_a_way_that_is_expected_to_be_slower_is_named_and_not_searched() -> None:
    result = planned(request(), budget(80, gpus=8))
    assert [layout.verdict for layout in result.layouts].count("slower by estimate") >= 1
    assert len({tuple(layout.sizes.items()) for layout in result.layouts}) == len(result.layouts)


def test_where_nothing_fits_the_refusal_is_that_of_the_way_that_needs_least() -> None:
    bases = (Strategy(), Strategy(cfg_size=2))
    free, guided = (search(request(), budget(1.5), Options(base, offers=False), Card()) for base in bases)
    assert isinstance(free, Refusal)
    assert isinstance(guided, Refusal)
    assert free.smallest_bytes < guided.smallest_bytes


def test_the_json_says_how_many_gpus_there_are_and_every_way() -> None:
    document = planned(request(), budget(80)).to_json()
    assert (document["budget"]["gpus"], document["budget"]["link"]) == (2, None)
    assert {"sizes", "verdict", "seconds_per_step", "peak_device_bytes", "host_bytes"} == set(document["layouts"][0])

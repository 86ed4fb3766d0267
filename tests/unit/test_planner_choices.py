"""Each choice of the planner alone, on forecasts of a few figures: tiles, variants, resident blocks, passes, boundaries of what fits."""

from __future__ import annotations

from typing import Any

import pytest

from planner_table import REQUEST, Table, trials_of
from wanvram.config import Request, Strategy
from wanvram.knobs import FROM, JOINT, RESIDENT, allowed
from wanvram.planner import transformer
from wanvram.planner.tiles import largest_tile, tiles_for
from wanvram.planner.transformer import (
    cannot_fit,
    fastest_streamed,
    leanest,
    most_resident,
    variants,
    whole_transformer,
    worth_trying,
)

TILES = [None, 80, 52, 40, 30, 20]
PLAIN = Strategy()
BLOCK, DISK = FROM["pinned"].on(PLAIN), FROM["disk"].on(PLAIN)


# --- tiles -------------------------------------------------------------------------------------------------------------------


def tiled(
    fitting: int, gpus: int = 1, seconds: Any = lambda name, s: 1.0, halves: str = "t2v-1.3B"
) -> tuple[Any, list[Any]]:
    """The tile that is chosen where `TILES[fitting]` is the largest that fits, and the tiles that were asked for."""
    table = Table(peak=lambda name, s: 100 - TILES.index(s.vae_tile), seconds=seconds)
    request = Request.for_task(halves, size="832*480")
    found = largest_tile(trials_of(table, 100 - fitting, request=request, gpus=gpus), PLAIN)
    return None if found is None else found.vae_tile, [s.vae_tile for name, s in table.asked if name == "vae_decoder"]


def test_the_tiles_of_a_frame_are_those_that_are_smaller_the_largest_first() -> None:
    assert tiles_for(REQUEST) == TILES
    assert tiles_for(Request.for_task("t2v-1.3B", size="640*160")) == [None, 52, 40, 30, 20]


@pytest.mark.parametrize(
    ("fitting", "asked"),
    [
        (0, [None]),
        (1, [None, 80]),
        (2, [None, 80, 40, 52]),
        (3, [None, 80, 40, 52]),
        (4, [None, 80, 40, 30]),
        (5, [None, 80, 40, 30, 20]),
    ],
)
def test_the_largest_tile_that_fits_to_the_byte_is_found_by_bisection_after_the_two_largest(
    fitting: int, asked: list[int | None]
) -> None:
    assert tiled(fitting) == (TILES[fitting], asked)


def test_no_tile_is_chosen_where_the_smallest_is_a_byte_too_large() -> None:
    assert tiled(6) == (None, [None, 80, 40, 30, 20])


def test_of_several_gpus_smaller_tiles_are_taken_as_long_as_both_halves_together_get_faster() -> None:
    def seconds(*times: float | None) -> Any:
        return lambda name, s: times[TILES.index(s.vae_tile)] if name == "vae_decoder" else 1.0

    assert tiled(0, 2, seconds(9, 8, 7, 7, 1, 1))[0] == 52, "what is as fast is no gain"
    assert tiled(0, 2, seconds(9, 8, 7, 6, 5, 4))[0] == 20
    assert tiled(1, 2, seconds(9, 8, 7, 7.5, 1, 1))[0] == 52
    assert tiled(0, 2, seconds(9, 10, 1, 1, 1, 1))[0] is None
    assert tiled(1, 2, seconds(9, None, 1, 1, 1, 1))[0] == 80
    assert tiled(1, 2, seconds(9, 8, None, 1, 1, 1))[0] == 80
    assert tiled(1, 1, seconds(9, 8, 7, 6, 5, 4))[0] == 80, "one GPU has nobody to share with"


def test_what_the_encoder_loses_counts_beside_what_the_decoder_gains() -> None:
    def seconds(name: str, s: Strategy) -> float:
        number = TILES.index(s.vae_tile)
        return 9.0 - number if name == "vae_decoder" else 1.0 + 2 * number

    assert tiled(1, 2, seconds, "i2v-14B")[0] == 80
    assert tiled(1, 2, seconds)[0] == 20, "a task without a picture to encode"


# --- variants of the transformer ---------------------------------------------------------------------------------------------


def shape(way: Strategy) -> tuple[bool, str, int | None]:
    return way.attention_slicing, way.residual_in, way.rows_per_chunk


WAYS = [
    (False, "device", None),
    (True, "device", None),
    (False, "pinned", 4096),
    (False, "pinned", 2048),
    (True, "device", 4096),
]


def test_the_variants_are_the_fastest_first_and_the_leanest_is_the_stream_in_ram_with_the_fewest_rows() -> None:
    assert [shape(way) for way in variants(REQUEST, BLOCK)] == WAYS
    assert shape(leanest(REQUEST, BLOCK)) == WAYS[3]
    vace = Request.for_task("vace-1.3B")
    assert [shape(way) for way in variants(vace, BLOCK)] == [WAYS[0], WAYS[1], WAYS[4]]
    assert shape(leanest(vace, BLOCK)) == WAYS[4], "two streams stay on the device, where slicing is the leanest"


@pytest.mark.parametrize(("peak", "count"), [(99, 5), (100, 5), (101, 4)])
def test_slicing_in_few_rows_is_tried_only_where_the_stream_in_ram_was_not_too_large(peak: int, count: int) -> None:
    table = Table(peak=lambda name, s: peak if s.rows_per_chunk == 2048 else 100)
    assert [shape(way) for way in worth_trying(trials_of(table, 100), BLOCK)] == WAYS[:count]


@pytest.mark.parametrize(("peak", "too_large"), [(100, False), (101, True)])
def test_nothing_can_fit_where_the_leanest_variant_was_forecast_a_byte_too_large(peak: int, too_large: bool) -> None:
    trials = trials_of(Table(peak=lambda name, s: peak if s.residual_in == "pinned" else 1), 100)
    assert not cannot_fit(trials, BLOCK), "nothing was forecast yet"
    trials.of("dit", leanest(REQUEST, BLOCK))
    assert cannot_fit(trials, BLOCK) is too_large


def test_the_whole_transformer_is_the_plain_resident_one() -> None:
    table = Table()
    whole_transformer(trials_of(table, 100), DISK)
    assert table.asked == [("dit", RESIDENT.on(DISK))]
    assert (table.asked[0][1].load_strategy, table.asked[0][1].weights_in) == ("full", "pinned")


# --- resident blocks ---------------------------------------------------------------------------------------------------------


def linear(each: int, claimed: int | None = None) -> Table:
    """100 bytes and `each` a resident block; the resident transformer says `claimed` for each of 28 more than two."""

    def peak(_: str, s: Strategy) -> int:
        return (
            100 + 28 * (each if claimed is None else claimed)
            if s.load_strategy == "full"
            else 100 + each * s.resident_blocks
        )

    return Table(peak=peak)


@pytest.mark.parametrize(
    ("limit", "blocks"), [(100, 0), (109, 0), (110, 1), (119, 1), (150, 5), (399, 29), (400, 30), (9000, 30)]
)
def test_as_many_blocks_stay_as_the_limit_holds_to_the_byte_and_one_forecast_verifies_it(
    limit: int, blocks: int
) -> None:
    table = linear(10)
    found = most_resident(trials_of(table, limit), BLOCK, limit)
    assert found.resident_blocks == blocks
    assert [s.resident_blocks for _, s in table.asked if s.resident_blocks] == ([blocks] if blocks else [])


def test_blocks_that_weigh_another_amount_than_expected_are_corrected_by_what_was_forecast() -> None:
    assert most_resident(trials_of(linear(20, claimed=10), 300), BLOCK, 300).resident_blocks == 10
    assert most_resident(trials_of(linear(10, claimed=20), 300), BLOCK, 300).resident_blocks == 20
    assert most_resident(trials_of(linear(0, claimed=10), 125), BLOCK, 125).resident_blocks == 25
    assert most_resident(trials_of(linear(0, claimed=0), 105), BLOCK, 105).resident_blocks == 5


def test_four_forecasts_are_spent_on_the_number_of_blocks_and_the_last_that_fitted_is_taken() -> None:
    def peak(_: str, s: Strategy) -> int:
        return 100 + 28 * 100 if s.load_strategy == "full" else 100 + s.resident_blocks**2

    table = Table(peak=peak)
    found = most_resident(trials_of(table, 600), BLOCK, 600)
    asked = [s.resident_blocks for _, s in table.asked if s.resident_blocks]
    assert len(asked) == 4
    assert peak("dit", found) <= 600
    assert found.resident_blocks == max(n for n in asked if 100 + n * n <= 600)


# --- streamed ----------------------------------------------------------------------------------------------------------------


def streamed(
    steps: list[float | None],
    fits: str = "yyyyy",
    resident: float | None = 1.0,
    host: Any = lambda name, s: 0,
    **more: Any,
) -> tuple[Any, list[int]]:
    """What is chosen of the five ways, by number, and those that were looked at. A block more does not fit any device.

    steps: seconds of each way, of which `fits` says y where the device holds it.
    """

    def number(s: Strategy) -> int:
        return WAYS.index(shape(s))

    def peak(_: str, s: Strategy) -> int:
        if s.load_strategy == "full":
            return 10_000
        return (100 if fits[number(s)] == "y" else 101) + 300 * s.resident_blocks if s.cfg == "sequential" else 101

    def step(_: str, s: Strategy) -> float | None:
        return resident if s.load_strategy == "full" else 9.0 if s.cfg == "joint" else steps[number(s)]

    table = Table(peak=peak, step=step, host=host)
    found = fastest_streamed(trials_of(table, 100, **more), BLOCK)
    looked = [s for _, s in table.asked if s.load_strategy == "block" and s.cfg == "sequential"]
    return None if found is None else number(found), list(dict.fromkeys(number(s) for s in looked))


@pytest.mark.parametrize(
    ("steps", "fits", "chosen", "looked"),
    [
        ([1.01, 0.5, 0.5, 0.5, 0.5], "yyyyy", 0, [0]),  # within 1 % of the resident one
        ([1.0105, 1.5, 0.5, 0.5, 0.5], "yyyyy", 0, [0, 1]),  # slicing is tried, a stream in RAM adds copies
        ([1.5, 1.4, 0.5, 0.5, 0.5], "yyyyy", 1, [0, 1]),
        ([1.5, 1.5, 0.5, 0.5, 0.5], "yyyyy", 0, [0, 1]),  # the first of two that are as fast
        ([0.5, 1.5, 1.4, 1.3, 0.5], "nyyyy", 3, [0, 1, 2, 3]),  # only slicing fits: the stream in RAM may be faster
        ([0.5, 1.0, 0.9, 0.9, 0.9], "nyyyy", 1, [0, 1]),
        ([0.5, 1.5, 1.0, 0.9, 0.9], "nyyyy", 2, [0, 1, 2]),
        ([0.5, 0.5, 1.5, 1.4, 1.3], "nnyyy", 2, [0, 1, 2]),  # few rows cost more than they leave for blocks
        ([0.5, 0.5, 0.5, 1.5, 1.3], "nnnyy", 3, [0, 1, 2, 3]),
        ([0.5, 0.5, 0.5, 0.5, 1.3], "nnnny", None, [0, 1, 2, 3]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], "nnnnn", None, [0, 1, 2, 3]),
        ([None, 0.5, 0.5, 0.5, 0.5], "yyyyy", 0, [0]),  # unknown times: the first that fits
        ([None, None, None, None, None], "nyyyy", 1, [0, 1]),
    ],
)
def test_the_search_ends_where_nothing_faster_can_come(
    steps: list[float | None], fits: str, chosen: int | None, looked: list[int]
) -> None:
    assert streamed(steps, fits) == (chosen, looked)


def test_what_host_ram_does_not_hold_is_passed_over() -> None:
    def host(limit: int) -> Any:
        return lambda name, s: 50 if s.residual_in == "pinned" and s.rows_per_chunk == 4096 else limit

    assert streamed([0.5, 0.5, 1.5, 1.4, 1.3], "nnyyy", host=host(40), ram=40) == (3, [0, 1, 2, 3])
    assert streamed([1.5, 1.4, 0.5, 0.5, 0.5], "yyyyy", host=host(40), ram=40) == (1, [0, 1])
    assert streamed([1.5, 1.4, 0.5, 0.5, 0.5], "yyyyy", host=host(41), ram=40)[0] is None


@pytest.mark.parametrize(("base", "looked_at"), [(140, True), (141, False)])
def test_weights_that_neither_the_device_nor_ram_holds_are_not_simulated_streamed(base: int, looked_at: bool) -> None:
    table = Table(base=lambda name, s: base)
    trials = trials_of(table, 100, ram=40)
    assert (fastest_streamed(trials, BLOCK) is not None) is looked_at
    assert any(s.load_strategy == "block" for _, s in table.asked) is looked_at
    if not looked_at:
        (trial,) = trials.failed
        assert (trial.component, trial.memory, trial.needed, trial.limit, trial.forecast) == (
            "dit",
            "host",
            41,
            40,
            None,
        )
    assert fastest_streamed(trials_of(table, 100, ram=40), DISK) is not None, "the disk holds them"


@pytest.mark.parametrize(
    ("home", "step", "blocks"), [("disk", 1.01, 0), ("disk", 1.02, 5), ("pinned", 1.0, 5), ("disk", None, 5)]
)
def test_blocks_stay_resident_where_that_saves_time_or_ram(home: str, step: float | None, blocks: int) -> None:
    table = linear(10)
    table.step = lambda name, s: 1.0 if s.load_strategy == "full" else step
    found = fastest_streamed(trials_of(table, 150), FROM[home].on(PLAIN))
    assert found is not None
    assert found.resident_blocks == blocks


# --- passes over the weights -------------------------------------------------------------------------------------------------

FOUR = Strategy(load_strategy="block", batch_size=4, resident_blocks=3)
SEED = Request.for_task("t2v-1.3B", size="832*480", prompt="a", base_seed=1)


def shared(times: dict[tuple[str, int | None], float | None], plain: Strategy = FOUR, request: Request = SEED) -> Any:
    """(cfg, micro_batch_size) of the way that is chosen of those with a time; others do not fit."""

    def key(s: Strategy) -> tuple[str, int | None]:
        return s.cfg, s.micro_batch_size

    table = Table(peak=lambda name, s: 1 if key(s) in times else 101, step=lambda name, s: times.get(key(s), 1.0))
    found = transformer._sharing(trials_of(table, 100, request=request), plain)
    assert found is None or found.resident_blocks == 0
    return None if found is None else key(found)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({("joint", None): 2.0, ("sequential", 2): 2.0, ("sequential", 4): 2.0, ("joint", 4): 2.0}, ("joint", None)),
        (
            {("joint", None): 2.03, ("sequential", 2): 2.02, ("sequential", 4): 2.0, ("joint", 4): 2.0},
            ("sequential", 2),
        ),
        ({("joint", None): 3.0, ("sequential", 2): 2.5, ("sequential", 4): 2.021, ("joint", 4): 2.0}, ("joint", 4)),
        ({("sequential", 2): 2.5, ("sequential", 4): 2.0}, ("sequential", 4)),
        (
            {("sequential", 4): 2.0, ("joint", 2): 1.0},
            ("sequential", 4),
        ),  # only the fewest streams are joined, and the most
        ({("joint", None): None, ("sequential", 4): 2.0}, ("sequential", 4)),
        ({("joint", None): None}, None),
        ({}, None),
    ],
)
def test_the_fewest_streams_within_one_per_cent_of_the_fastest_pass_together(times: Any, chosen: Any) -> None:
    assert shared(times) == chosen


def test_without_guidance_there_is_no_second_pass_to_join() -> None:
    alone = Request.for_task("t2v-1.3B", size="832*480", prompt="a", base_seed=1, sample_guide_scale=1.0)
    assert shared({("joint", None): 1.0, ("sequential", 2): 2.0, ("joint", 4): 1.0}, request=alone) == ("sequential", 2)


def test_one_video_shares_a_pass_with_its_other_guidance_and_nothing_else() -> None:
    one = Strategy(load_strategy="block", resident_blocks=3)
    assert shared({("joint", None): 2.0}, one) == ("joint", None)
    joined = allowed(JOINT, one)
    assert joined is not None
    assert (joined.cfg, joined.attention_slicing, joined.resident_blocks) == ("joint", True, 0)


def test_a_step_that_waits_is_shared_where_that_is_faster() -> None:
    def chosen(joint: float) -> str:
        table = Table(
            peak=lambda name, s: 10_000 if s.load_strategy == "full" else 100 + 300 * s.resident_blocks,
            step=lambda name, s: 1.0 if s.load_strategy == "full" else joint if s.cfg == "joint" else 1.5,
        )
        found = fastest_streamed(trials_of(table, 100), BLOCK)
        assert found is not None
        return found.cfg

    assert [chosen(joint) for joint in (1.4, 1.5, 1.6)] == ["joint", "sequential", "sequential"]

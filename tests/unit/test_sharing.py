"""Shares of rows, heads and chunks: they make up the whole, differ by at most one, and nobody is counted twice."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanvram.errors import InputError
from wanvram.sharing import (
    ALONE,
    CFG,
    RING,
    SEQUENCE,
    ULYSSES,
    WORLD,
    Place,
    Sequence,
    meetings,
    parts,
    rows_at_once,
    size,
    travelling,
)

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))


@given(st.integers(0, 200), st.integers(1, 12))
def test_parts_make_up_the_whole_and_differ_by_at_most_one(total: int, count: int) -> None:
    runs = parts(total, count)
    assert len(runs) == count
    assert (runs[0].start, runs[-1].stop) == (0, total)
    assert all(a.stop == b.start for a, b in pairwise(runs))
    assert size(runs[0]) - size(runs[-1]) in (0, 1)


@given(sizes)
def test_the_ranks_of_every_axis_agree_on_who_they_are_and_in_which_order(shape: tuple[int, int, int]) -> None:
    places = [Place(rank, *shape) for rank in range(shape[0] * shape[1] * shape[2])]
    for axis in (ULYSSES, RING, CFG, SEQUENCE, WORLD):
        for place in places:
            members = place.members(axis)
            assert all(places[other].members(axis) == members for other in members)
            assert members[place.index(axis)] == place.rank
        groups = {place.members(axis) for place in places}
        assert sorted(rank for group in groups for rank in group) == list(range(len(places)))
    for place in places:
        assert place.index(SEQUENCE) == place.index(RING) * place.ulysses + place.index(ULYSSES)


@given(sizes, st.integers(16, 90), st.integers(4, 9), st.integers(1, 40))
def test_rows_and_chunks_of_all_ranks_are_the_sequence(
    shape: tuple[int, int, int], tokens: int, heads: int, rows: int
) -> None:
    shares = [Sequence(Place(rank, *shape), tokens, heads, rows) for rank in range(shape[0] * shape[1])]
    assert [row for share in shares for row in range(tokens)[share.rows]] == list(range(tokens))
    assert sum(shares[0].stations) == tokens
    for share in shares:
        assert len(share.chunks) == len(share.pieces)
        assert sum(map(size, share.chunks)) == size(share.rows)
        assert all(size(chunk) > 0 for chunk in share.chunks)
        assert share.pieces[-1].stop == share.stations[share.place.index(RING)]
        station = [other for other in shares if other.place.index(RING) == share.place.index(RING)]
        assert len({len(other.chunks) for other in station}) == 1
        assert [head for other in station for head in range(heads)[other.my_heads]] == list(range(heads))


def test_a_rank_without_a_head_or_a_row_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match="ulysses_size: 8 GPUs cannot share 4 heads; give at most 4"):
        Sequence(Place(0, ulysses=8), 100, 4, 10)
    with pytest.raises(InputError, match="8 GPUs cannot share 5 tokens"):
        Sequence(Place(0, ulysses=2, ring=4), 5, 4, 10)


def test_alone_is_a_world_of_one() -> None:
    assert ALONE.world == 1
    assert ALONE.members(WORLD) == (0,)


@pytest.mark.parametrize(
    ("place", "weights", "buffers"),
    [
        (Place(0), True, 0),
        (Place(0, ulysses=2), False, 1),
        (Place(1, cfg=2), False, 2),
        (Place(0, ring=2), True, 3),
        (Place(3, ulysses=2, ring=2, cfg=2), True, 6),
    ],
)
def test_each_set_of_ranks_that_exchange_has_one_buffer_for_each_use(place: Place, weights: bool, buffers: int) -> None:
    found = meetings(place, weights=weights)
    assert len(found) == buffers
    assert all(place.rank in members and place.members(axis) == members for (members, _), axis in found.items())


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "rows"), [(75600, 8400), (32760, 8190), (32760, 32760), (10920, 10920)])
def test_a_wide_share_travels_in_two_chunks_at_least_where_it_is_long(count: int, tokens: int, rows: int) -> None:
    place = Place(0, ulysses=count)
    whole, at_once = rows_at_once(place, tokens, rows), travelling(place, tokens, rows, 5120)
    assert at_once == whole if whole < 4096 else 2048 <= at_once <= -(-tokens // count // 2) + 1


def test_as_many_chunks_travel_as_one_gpu_makes_of_the_sequence() -> None:
    assert travelling(Place(0, ulysses=2), 75600, 8400, 5120) == 4200
    assert travelling(Place(0, ulysses=2), 32760, 8190, 1536) == 8190  # narrow: whole

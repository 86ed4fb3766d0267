"""One simulation for every kind of rank: which ranks are alike, that they are, and what their records make together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.predict.ranks import as_one_run, communication_of, kinds_of
from wanvram.predict.simulate import simulate, simulate_rank
from wanvram.predict.stage import simulate_stage
from wanvram.record import Failure, RankRecord, RunRecord, Times
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.links import link_of
from wanvram.simulate.timeline import Timeline
from wanvram.spans import Memory, Span
from wanvram.units import MIB


def full(task: str = "t2v-1.3B", size: str = "832*480", link: str | None = None, **sizes: Any) -> RunConfig:
    how = Strategy(load_strategy="block", offload=True, **sizes)
    return RunConfig("x", "", "simulated", Request.for_task(task, size=size), how, gpu="h200", link=link)


def tiny(link: str | None = None, limit: int | None = None, **chosen: Any) -> RunConfig:
    request = Request.for_task("t2v-1.3B", size="80*144", frame_num=9, sample_steps=2, prompt="a cat", base_seed=3)
    how = Strategy(precision="fp32", **{"load_strategy": "block", "offload": True, **chosen})
    few = Measurement(profile_memory=False)
    return RunConfig("x", "", "simulated", request, how, few, "tiny", gpu="h200", link=link, memory_limit_bytes=limit)


# --- kinds -------------------------------------------------------------------------------------------------------------------


def test_equal_shares_are_one_kind_while_denoising_and_the_first_rank_is_one_of_its_own_otherwise() -> None:
    config = full(ulysses_size=4)
    assert kinds_of(config, "dit") == [(0, 1, 2, 3)]
    assert kinds_of(config) == [(0,), (1, 2, 3)]
    assert kinds_of(full()) == [(0,)]


def test_twelve_heads_over_eight_ranks_are_two_kinds() -> None:
    assert kinds_of(full(ulysses_size=8), "dit") == [(0, 1, 2, 3), (4, 5, 6, 7)]


@pytest.mark.parametrize("link", ["nvlink", "pcie5", "host"])
def test_a_timeline_has_everything_that_a_rank_allocates_also_what_its_peers_leave_before_the_run(link: str) -> None:
    record, memory = simulate(tiny(link=link, ulysses_size=2), timeline=True)
    assert record.failure is None
    assert isinstance(memory.observer, Timeline)
    _, plain = simulate(tiny(link=link, ulysses_size=2))
    assert memory.allocator.peak_allocated_bytes == plain.allocator.peak_allocated_bytes


def test_text_is_the_first_rank_s_and_so_is_a_frame_decoded_whole() -> None:
    config = full(ulysses_size=2, cfg_size=2)
    assert kinds_of(config, "text_encoder") == [(0,)]
    assert kinds_of(config, "vae_decoder") == [(0,)]
    shared = kinds_of(full(ulysses_size=2, cfg_size=2, vae_tile=40), "vae_decoder")
    assert sorted(rank for kind in shared for rank in kind) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "sizes",
    [
        {"ulysses_size": 4, "vae_tile": 8},
        {"ulysses_size": 2, "ring_size": 2, "rows_per_chunk": 7},
        {"ring_size": 3},
        {"ulysses_size": 2, "cfg_size": 2, "dit_fsdp": True},
    ],
)
def test_every_rank_takes_what_the_one_that_stands_for_it_takes(sizes: dict[str, Any]) -> None:
    config = tiny(**sizes)
    record, _ = simulate(config)
    assert sorted(rank for kind in record.ranks for rank in kind.ranks) == list(range(config.gpus))
    for kind in record.ranks:
        for rank in kind.ranks:
            alone, _ = simulate_rank(config, rank)
            assert [(s.name, s.peak, s.seconds) for s in alone.stages] == [
                (s.name, s.peak, s.seconds) for s in kind.stages
            ]


# --- what they make together -------------------------------------------------------------------------------------------------


def test_the_record_of_several_gpus_says_what_joins_them_and_its_peak_is_the_largest() -> None:
    record, _ = simulate(tiny(ulysses_size=2, link="host"))
    assert any(note.startswith("link: host, 23.2 GB/s") for note in record.notes)
    assert {rank.communication_bytes for rank in record.ranks} == {446 * MIB}
    peaks = [peak.device_bytes or 0 for rank in record.ranks if (peak := rank.peak()) is not None]
    peak = record.peak()
    assert peak is not None
    assert peak.device_bytes == max(peaks)
    assert all(rank.exchanged_bytes > 0 and rank.exchange_seconds > 0 for rank in record.ranks)


def test_what_communication_takes_is_taken_from_every_card() -> None:
    one, two = (simulate(tiny(link=None if n == 1 else "host", ulysses_size=n))[0].peak() for n in (1, 2))
    assert one is not None
    assert two is not None
    assert 440 * MIB < (two.device_bytes or 0) - (one.device_bytes or 0) <= 446 * MIB
    config = full(ulysses_size=2)
    assert communication_of(full(), link_of(GPUS["h200"], None, 2)) == 0
    assert communication_of(config, link_of(GPUS["h200"], "host", 2)) == 446 * MIB


def test_a_slower_link_makes_the_same_run_slower() -> None:
    fast, slow = (
        simulate_stage(full(ulysses_size=2, link=link), "dit").seconds_per_step for link in ("nvlink", "pcie3")
    )
    assert fast is not None
    assert slow is not None
    assert fast < slow
    with pytest.raises(InputError, match="has no NVLink"):
        simulate(replace(tiny(ulysses_size=2, link="nvlink"), gpu="rtx4090"))


def made(stages: list[Span], failure: Failure | None = None) -> RankRecord:
    return RankRecord((1,), "simulated:h200", stages, {"pinned_bytes": 0}, failure=failure)


def span(name: str, device: int, seconds: float, children: tuple[Span, ...] = ()) -> Span:
    memory = Memory(device, device, device)
    return Span(name, "stage", "dit", memory, memory, memory, seconds, children=list(children))


def a_record(*stages: Span, limit: int | None = None) -> RunRecord:
    times = Times(1.0, 10.0, 9.0)
    return RunRecord("simulated:h200", True, {}, True, limit, [], list(stages), {}, {}, times=times)


def test_a_run_takes_as_long_as_its_slowest_rank_stage_by_stage() -> None:
    record = a_record(span("encode_text", 5, 1.0), span("denoise", 9, 4.0, (span("step 0", 9, 2.0),)))
    other = made([span("denoise", 7, 5.5, (span("step 0", 7, 3.0),))])
    as_one_run(record, [RankRecord((0,), record.device, record.stages, {}), other])
    assert [stage.seconds for stage in record.stages] == [1.0, 5.5]
    assert record.stages[1].children[0].seconds == 3.0
    assert record.times == Times(1.0, 11.5, 10.5)
    assert [stage.seconds for stage in record.ranks[0].stages] == [1.0, 4.0]


def test_a_run_fits_only_if_every_rank_does_and_a_failure_says_whose_it_is() -> None:
    record = a_record(span("denoise", 5, 1.0), limit=8)
    as_one_run(record, [RankRecord((0,), "", record.stages, {}), made([span("denoise", 9, 1.0)])])
    assert record.fits is False
    full_card = a_record(span("denoise", 5, 1.0), limit=8)
    oom = Failure("oom", "no room")
    as_one_run(full_card, [RankRecord((0,), "", full_card.stages, {}), made([span("denoise", 7, 1.0)], oom)])
    assert full_card.fits is False
    assert full_card.failure is not None
    assert full_card.failure.message == "rank 1: no room"


def test_a_stage_s_forecast_is_of_the_rank_that_takes_most_and_its_host_memory_is_that_of_all() -> None:
    alone, pair = (simulate_stage(full(ulysses_size=n), "dit") for n in (1, 2))
    assert pair.peak_allocated_bytes < alone.peak_allocated_bytes
    assert pair.host_bytes == pytest.approx(2 * alone.host_bytes, rel=0.01)
    shared = simulate_stage(full(ulysses_size=2, dit_fsdp=True), "dit")
    assert shared.host_bytes == pytest.approx(alone.host_bytes, rel=0.01)
    assert (pair.seconds_per_step or 0) == pytest.approx((alone.seconds_per_step or 0) / 2, rel=0.15)


def test_text_that_all_ranks_share_the_weights_of_is_encoded_by_all() -> None:
    config = full(ulysses_size=2, t5_fsdp=True)
    assert kinds_of(config, "text_encoder") == [(0, 1)]
    alone, shared = (simulate_stage(c, "text_encoder").host_bytes for c in (full(), config))
    assert shared == pytest.approx(alone, rel=0.02)

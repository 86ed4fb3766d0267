"""Ranks of a simulated run on several GPUs: which of them are alike, so that one stands for all, and what all take together."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import replace

from wanvram.config import RunConfig
from wanvram.engine.devices import SimulatedDevice
from wanvram.knobs import ROWS_PER_CHUNK, T5_FSDP, VAE_TILE, chunk_rows, shares_weights
from wanvram.media.inputs import prepare_inputs
from wanvram.models.vae_tiles import grid
from wanvram.record import Failure, RankRecord, RunRecord
from wanvram.sharing import CFG, HELD_BYTES, RING, Sequence, meetings, size, travelling
from wanvram.simulate.links import Link, communication_bytes
from wanvram.spans import Span
from wanvram.specs import DIT
from wanvram.units import human

__all__ = ["as_one_run", "communication_note", "communication_of", "kinds_of", "rank_record", "rooms_of"]


def kinds_of(config: RunConfig, component: str | None = None) -> list[tuple[int, ...]]:
    """Ranks that take the same memory and time, rank 0, which does more than its share, alone and first.

    component: only what they do with that one counts (planner.forecasts.components_of names it), and ranks that do nothing with it
    are left out. Ranks are alike that have as many rows, chunks and heads, see the stations of a ring in the same order and
    decode tiles of the same sizes.
    """
    if config.gpus == 1:
        return [(0,)]
    if component == "text_encoder" and T5_FSDP.of(config.strategy):
        return [tuple(range(config.gpus))]
    if component in ("text_encoder", "image_encoder", "vae_encoder"):
        return [(0,)]
    inputs, _ = prepare_inputs(config.request, simulated=True, real_weights=False)
    tokens = inputs.geometry.tokens(inputs.noise_shape)
    rows, spec = chunk_rows(tokens, ROWS_PER_CHUNK.of(config.strategy)), DIT[config.request.facts.dit]
    found: dict[str, list[int]] = {}
    for rank in range(config.gpus):
        place = config.place(rank)
        sequence = Sequence(place, tokens, spec.num_heads, travelling(place, tokens, rows, spec.dim))
        here, stations = place.index(RING), sequence.stations
        runs = [[size(chunk) for chunk in run] for run in (sequence.chunks, sequence.pieces)]
        shared = [size(sequence.my_heads), place.index(CFG), runs, stations[here:] + stations[:here]]
        tiles = _tiles(config, inputs.noise_shape[2:], rank)
        if component == "vae_decoder" and not tiles:
            continue
        parts = {"dit": [shared], "vae_decoder": [tiles]}.get(component or "", [shared, tiles, rank == 0])
        found.setdefault(str(parts), []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _tiles(config: RunConfig, frame: tuple[int, int], rank: int) -> list[object]:
    """Sizes of the tiles that a rank decodes, and at which edges of the frame; whole frames are rank 0's alone."""
    tile = VAE_TILE.of(config.strategy)
    if tile is None:
        return ["whole"] if rank == 0 else []
    mine = list(grid(*frame, (tile, tile)))[rank :: config.gpus]
    return [[(s.stop - s.start, s.start == 0, s.stop == s.extent) for s in area] for area in mine]


def rooms_of(config: RunConfig, rank: int) -> list[tuple[int, ...]]:
    """The members of each buffer through which the rank exchanges by copies."""
    return [members for members, _ in meetings(config.place(rank), weights=shares_weights(config.strategy))]


def communication_of(config: RunConfig, link: Link) -> int:
    """Bytes of each card that exchanges take; 0 of one."""
    if link.copies:
        return HELD_BYTES * len(rooms_of(config, 0))
    return communication_bytes(link, config.gpus, shards=shares_weights(config.strategy))


def communication_note(config: RunConfig, link: Link) -> str:
    """What joins the ranks, and what that takes of each card."""
    taken = human(communication_of(config, link))
    if link.copies:
        what = f"their buffers take {taken} of each card"
    else:
        basis = "measured on two H200s" if config.gpus == 2 and link.channels != 2 else "computed from two H200s"
        what = f"NCCL takes {taken} of each card, {basis}"
    return f"link: {link.name}, {link.bytes / 1e9:.3g} GB/s each way, {link.source}; {what}"


def rank_record(ranks: tuple[int, ...], record: RunRecord, config: RunConfig, device: SimulatedDevice) -> RankRecord:
    """What each of these took, of which the first was simulated."""
    exchanged, link = device.exchanged(), device.clock.link
    assert link is not None
    return RankRecord.of(ranks, record, (exchanged.nbytes, exchanged.seconds), communication_of(config, link))


def as_one_run(record: RunRecord, ranks: Ordered[RankRecord]) -> None:
    """Makes the record of rank 0 that of all: every stage as long as the slowest rank takes for it, and the first failure is the run's."""
    before = _seconds(record.stages)
    record.stages = [_slowest(stage, [r.stages for r in ranks[1:]]) for stage in record.stages]
    record.ranks = list(ranks)
    longer = _seconds(record.stages) - before
    known = ((name, getattr(record.times, name)) for name in ("in_all_seconds", "after_plan_seconds"))
    record.times = replace(record.times, **{name: time + longer for name, time in known if time is not None})
    if record.failure is None:
        record.failure = next((_of_rank(r, r.failure) for r in ranks if r.failure is not None), None)
    if record.budget_bytes is not None:
        peak = record.peak()
        used = 0 if peak is None else peak.device_bytes or peak.reserved_bytes
        out_of_memory = record.failure is not None and record.failure.kind == "oom"
        record.fits = False if out_of_memory else (None if record.failure else used <= record.budget_bytes)


def _of_rank(rank: RankRecord, failure: Failure) -> Failure:
    return replace(failure, message=f"rank {rank.name}: {failure.message}")


def _seconds(stages: Ordered[Span]) -> float:
    return sum(stage.seconds or 0.0 for stage in stages)


def _slowest(span: Span, others: Ordered[Ordered[Span]]) -> Span:
    """`others`: where the other ranks' spans of that name are."""
    same = [found for spans in others for found in spans if found.name == span.name]
    slowest = max([span, *same], key=lambda found: found.seconds or 0.0)
    children = [_slowest(child, [found.children for found in same]) for child in span.children]
    return replace(span, seconds=slowest.seconds, children=children)

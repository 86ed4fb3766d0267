"""How several GPUs can share a video, cfg x ring x ulysses of them: what each way costs in time, roughly, the fastest first. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from wanvram import knobs
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError, require
from wanvram.knobs import Change
from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import situation
from wanvram.simulate.links import Link, exchanged, link_of
from wanvram.specs import DIT

__all__ = ["SAME", "Sizes", "leanest_sizes", "sizes_at_once", "sizes_for", "sizes_of"]

# A number of a ring's result is read and written in float32 beside what comes, for each further station.
MERGED_BYTES = 12
SAME = 0.03  # expected times that differ by less say nothing
REACHED = 0.65  # of a card's rate, by products and attention together (EFFICIENCY has both)


@dataclass(frozen=True)
class Sizes:
    """expected_seconds: of a denoising step whose weights are on the device, by arithmetic and bytes alone: good for an order."""

    cfg: int
    ring: int
    ulysses: int
    expected_seconds: float = field(default=0.0, compare=False)

    @property
    def change(self) -> Change:
        return Change({knobs.CFG_SIZE: self.cfg, knobs.RING_SIZE: self.ring, knobs.ULYSSES_SIZE: self.ulysses})

    @property
    def count(self) -> int:
        return self.cfg * self.ring * self.ulysses


def sizes_of(strategy: Strategy) -> Sizes:
    return Sizes(knobs.CFG_SIZE.of(strategy), knobs.RING_SIZE.of(strategy), knobs.ULYSSES_SIZE.of(strategy))


def _given(strategy: Strategy, gpus: int) -> Sizes:
    """What the user said, 1 of each where nothing. Raises InputError where it is for another number of GPUs."""
    given = sizes_of(strategy)
    said = " x ".join(f"{knob.name} {value}" for knob, value in given.change.values.items())
    require(
        given.count in (1, gpus),
        f"{said} share the work of {given.count} GPUs, and {gpus} were asked for; give the same number, or leave the sizes out",
    )
    return given


def sizes_at_once(config: RunConfig, gpus: int) -> RunConfig:
    """The configuration with sizes for so many GPUs where there is no budget to plan for; those that are given are kept.

    Guidance first, on two GPUs it exchanges 19 MiB a step; then as many heads as divide, which exchange gigabytes; the ring for
    the rest, which takes more memory (docs/several-gpus.md). Raises InputError where they cannot share the work.
    """
    if _given(config.strategy, gpus).count == gpus:
        return config
    guided = config.request.guided and not knobs.CFG.differs(config.strategy)
    cfg = 2 if guided and gpus % 2 == 0 else 1
    ulysses = math.gcd(gpus // cfg, DIT[config.request.facts.dit].num_heads)
    try:
        return replace(config, strategy=Sizes(cfg, gpus // cfg // ulysses, ulysses).change.on(config.strategy))
    except InputError as error:
        raise InputError(f"{gpus} GPUs cannot share the work: {error}") from error


def sizes_for(request: Request, budget: Budget, base: Strategy) -> list[Sizes]:
    """Of the budget's GPUs, those that `base` allows; what the user said is the only one. Raises InputError where there is none.

    Of those expected to be equally fast guidance comes first, which exchanges least, then Ulysses, which needs the least memory.
    """
    given = _given(base, budget.gpus)
    link = exchanged(link_of(budget.card, budget.link, budget.gpus), budget.card, knobs.EXCHANGE.of(base))
    if given.count > 1 or budget.gpus == 1:
        return [given]
    found, refused = [], ""
    for sizes in _products(budget.gpus):
        if sizes.cfg == 2 and not request.guided:
            continue
        if sizes.ulysses > DIT[request.facts.dit].num_heads:
            continue
        try:
            sizes.change.on(base)
        except InputError as error:
            refused = str(error)
            continue
        found.append(Sizes(sizes.cfg, sizes.ring, sizes.ulysses, _seconds(request, budget, sizes, link)))
    if not found:
        raise InputError(refused or f"{budget.gpus} GPUs cannot share {request.task}; give fewer")
    fastest = min(sizes.expected_seconds for sizes in found)
    same = [sizes for sizes in found if sizes.expected_seconds <= fastest * (1 + SAME)]
    slower = sorted((sizes for sizes in found if sizes not in same), key=lambda sizes: sizes.expected_seconds)
    return [*sorted(same, key=lambda sizes: (-sizes.cfg, -sizes.ulysses)), *slower]


def leanest_sizes(found: list[Sizes]) -> Sizes:
    """That needs the least memory of a GPU: Ulysses shares rows and heads, a ring keeps more of them at once, guidance shares neither."""
    return max(found, key=lambda sizes: (sizes.ulysses, sizes.ring))


def _products(count: int) -> list[Sizes]:
    return [
        Sizes(cfg, ring, count // cfg // ring)
        for cfg in (1, 2)
        for ring in range(1, count + 1)
        if count % (cfg * ring) == 0
    ]


def _seconds(request: Request, budget: Budget, sizes: Sizes, link: Link) -> float:
    """The rank with most rows and heads decides. A ring's messages hide behind its attention as far as that is longer."""
    spec, tokens = DIT[request.facts.dit], situation(request).tokens
    passes = (2 if request.guided else 1) / sizes.cfg * spec.block_count
    shares = sizes.ring * sizes.ulysses
    rows, heads = -(-tokens // shares), -(-spec.num_heads // sizes.ulysses)
    rate = budget.card.product_flops * REACHED
    attention = 4 * tokens * (tokens / sizes.ring) * spec.dim * heads / spec.num_heads / rate
    row_wise = 2 * rows * (6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim) / rate
    exchanged = 4 * rows * spec.dim * 2 * (sizes.ulysses - 1) / sizes.ulysses
    passed_on = 2 * tokens / sizes.ring * spec.dim * heads / spec.num_heads * 2 * (sizes.ring - 1)
    exposed = exchanged / link.bytes + max(0.0, passed_on / link.bytes - attention)
    merged = MERGED_BYTES * tokens / sizes.ring * spec.dim * heads / spec.num_heads * (sizes.ring - 1)
    return float(passes * (attention + row_wise + exposed + merged / budget.card.bandwidth_bytes))

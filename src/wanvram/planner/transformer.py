"""The transformer's part of the search: how it is sliced, and how many of its blocks stay on the device. No torch.

Where the weights of a streamed block come from is given; the caller tries pinned, pageable and disk in turn.
"""

from __future__ import annotations

from collections.abc import Iterator

from wanvram import knobs
from wanvram.config import Request, Strategy
from wanvram.planner.forecasts import StageForecast, Trial, Trials, situation, stage_seconds
from wanvram.specs import DIT

__all__ = [
    "NEGLIGIBLE",
    "block_count",
    "cannot_fit",
    "fastest_streamed",
    "leanest",
    "most_resident",
    "variants",
    "whole_transformer",
    "worth_trying",
]

NEGLIGIBLE = 0.01  # of a step: within it of the resident transformer, the search stops looking for faster ways
VERIFICATIONS = 4  # forecasts spent on the number of resident blocks; blocks of one size need one


def block_count(request: Request) -> int:
    """Blocks that can stay on the device."""
    return DIT[request.facts.dit].block_count


def variants(request: Request, base: Strategy) -> list[Strategy]:
    """Lossless ways to hold fewer activations, the fastest first."""
    ways = [knobs.allowed(change, base) for change in knobs.leaner(situation(request))]
    return list(dict.fromkeys(way for way in ways if way is not None))


def leanest(request: Request, base: Strategy) -> Strategy:
    """Of the variants, on the device."""
    ways = variants(request, base)
    return next((way for way in reversed(ways) if knobs.RESIDUAL_IN.differs(way)), ways[-1])


def worth_trying(trials: Trials, base: Strategy) -> Iterator[Strategy]:
    """The variants in order; what comes after a stream in RAM only where that was not too large for the device."""
    before: Strategy | None = None
    for way in variants(trials.request, base):
        in_vain = before is not None and knobs.RESIDUAL_IN.differs(before) and not knobs.RESIDUAL_IN.differs(way)
        if in_vain and before and trials.of("dit", before).peak_device_bytes > trials.budget.device_limit:
            return
        yield way
        before = way


def fastest_streamed(trials: Trials, base: Strategy) -> Strategy | None:
    """The fastest block-streamed strategy that fits, `base` (streamed) with more knobs set; None: none fits.

    Nothing streamed is faster than the resident transformer, so the search ends once a step is within 1 % of that. Blocks stay
    resident where that saves time, or RAM that holds them otherwise. Unknown times: the first variant that fits, with as many
    resident blocks as fit.
    """
    if not _host_can_hold(trials, base):
        return None
    best: Strategy | None = None
    first: int | None = None  # that fits the device
    for number, way in enumerate(worth_trying(trials, base)):
        # A stream in RAM may be faster than slicing, but not where the plain way waits for copies, to which it adds. Chunks of few
        # rows cost more than the little that they leave for resident blocks.
        worth_it = (
            first is None
            or number < 2
            or (knobs.RESIDUAL_IN.differs(way) if first == 1 else best is None and first > 1)
        )
        if not worth_it or (first is not None and best is not None and not _waits(trials, best)):
            break
        found = _filled(trials, way)
        first = number if first is None and found is not None else first
        best = _faster(trials, best, found)
    if best is not None and _waits(trials, best):
        shared = _sharing(trials, best)
        best = _faster(trials, best, None if shared is None else _filled(trials, shared))
    return best


def _sharing(trials: Trials, plain: Strategy) -> Strategy | None:
    """`plain` without resident blocks and with fewer copies of its weights in a step, for more streams that pass them together.

    The fewest streams within 1 % of the fastest way that fits; None: none does.
    """
    empty = knobs.RESIDENT_BLOCKS.set(plain, 0)
    ways = [change.on(empty) for change in knobs.fewer_passes(plain)]
    together = [knobs.allowed(knobs.JOINT, way) for way in (empty, *ways[-1:])] if trials.request.guided else []
    joint = [way for way in together if way is not None]
    fitting = [way for way in (*joint[:1], *ways, *joint[1:]) if trials.fits_device("dit", way)]
    times = [trials.of("dit", way).seconds_per_step for way in fitting]
    known = [time for time in times if time is not None]
    if not known:
        return None
    limit = min(known) * (1 + NEGLIGIBLE)
    return next(way for way, time in zip(fitting, times, strict=True) if time is not None and time <= limit)


def cannot_fit(trials: Trials, base: Strategy) -> bool:
    """Whether the leanest variant is known to be too large for the device."""
    least = trials.known("dit", leanest(trials.request, base))
    return least is not None and least.peak_device_bytes > trials.budget.device_limit


def whole_transformer(trials: Trials, strategy: Strategy) -> StageForecast:
    """The resident transformer: what `strategy` is compared with."""
    return trials.of("dit", knobs.RESIDENT.on(strategy))


def _host_can_hold(trials: Trials, base: Strategy) -> bool:
    """False, without another simulation, if the weights that cannot be on the device do not go into host RAM either."""
    least = whole_transformer(trials, base).base_bytes - trials.budget.device_limit
    home = knobs.WEIGHTS_IN.of(base)
    limit = trials.budget.host_limit(home)
    if home == "disk" or least <= limit:
        return True
    trials.failed.append(Trial("dit", base, "host", least, int(limit), None))
    return False


def _filled(trials: Trials, start: Strategy) -> Strategy | None:
    """`start` with as many resident blocks as fit the device; none where a step does not wait and the disk holds the others."""
    if not trials.fits_device("dit", start):
        return None
    if knobs.WEIGHTS_IN.of(start) == "disk" and _waits(trials, start) is False:
        return start
    return most_resident(trials, start, trials.budget.device_limit)


def most_resident(trials: Trials, start: Strategy, limit: int) -> Strategy:
    """`start`, which fits, with as many resident blocks as device memory of `limit` bytes holds.

    Memory is linear in them: interpolated, then verified.
    """
    blocks = block_count(trials.request)
    least = trials.of("dit", start).peak_device_bytes
    # Streaming keeps buffers of about two blocks, so the resident transformer holds two fewer than `blocks` more.
    more = (
        whole_transformer(trials, start).peak_device_bytes
        - trials.of("dit", knobs.UNSLICED.on(start)).peak_device_bytes
    )
    per_block = max(1.0, more / (blocks - 2))
    fitting, too_many = 0, blocks + 1
    for _ in range(VERIFICATIONS):
        count = min(int((limit - least) / per_block), too_many - 1)
        if count <= fitting:
            break
        tried = trials.of("dit", knobs.RESIDENT_BLOCKS.set(start, count)).peak_device_bytes
        fitting, too_many = (count, too_many) if tried <= limit else (fitting, count)
        per_block = max(1.0, (tried - least) / count)
    return knobs.RESIDENT_BLOCKS.set(start, fitting)


def _waits(trials: Trials, strategy: Strategy) -> bool | None:
    """A step waits for copies: it takes more than 1 % longer than with every block resident. None: times are unknown."""
    now = trials.of("dit", strategy).seconds_per_step
    resident = whole_transformer(trials, strategy).seconds_per_step
    return None if now is None or resident is None else now > resident * (1 + NEGLIGIBLE)


def _faster(trials: Trials, best: Strategy | None, found: Strategy | None) -> Strategy | None:
    """`found` if it fits host RAM and is the faster one; the first of two whose times are unknown."""
    if found is None or not trials.fits_host("dit", found):
        return best
    if best is None:
        return found
    before, after = (stage_seconds(trials.request, trials.of("dit", s)) for s in (best, found))
    return found if before is not None and after is not None and after < before else best

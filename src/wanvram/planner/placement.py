"""Where the weights of every component are: on the device, or streamed from RAM or disk, or T5 on the host. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wanvram import knobs
from wanvram.config import Strategy
from wanvram.planner.forecasts import ENCODERS, Trials, components_of, steps_of, total_seconds, vae_halves
from wanvram.planner.transformer import block_count, cannot_fit, fastest_streamed, whole_transformer, worth_trying

__all__ = ["TIE", "Placements", "placements"]

TIE = 0.01  # of the time of a run: what differs by less counts as equally fast, and what needs less memory is taken


@dataclass(frozen=True)
class Placements:
    """found: ways that fit; the first is the fastest where times are unknown. fastest: seconds that none can beat; None: unknown."""

    found: tuple[Strategy, ...]
    fastest: float | None


def placements(trials: Trials, base: Strategy) -> Placements | None:
    """Everything resident in turn, else streamed or T5 on the host; None: nothing fits.

    Streaming from disk needs the least RAM. Where it takes within 1 % of the time that a resident transformer would take, it is
    the only way looked at.
    """
    dit_fits = trials.fits(base, "dit")
    if dit_fits and _encoders_fit(trials, base):
        return Placements((base,), trials.seconds(base))
    bound = _bound(trials, base)
    probe: Strategy | None = None
    for probe in _disk_probes(trials, base):
        if bound is None or _within(trials.seconds(probe), bound):
            break
    if probe is None and cannot_fit(trials, knobs.FROM["disk"].on(base)):
        return None
    if bound is not None and probe is not None and _within(trials.seconds(probe), bound):
        return Placements((probe,), bound)
    found = [_streamed(trials, base)]
    on_host = knobs.T5_CPU.set(base, True)
    if dit_fits and _encoders_fit(trials, on_host):
        found.append(on_host)
    ways = [way for way in found if way is not None] or ([probe] if probe is not None else [])
    times = [time for way in ways if (time := trials.seconds(way)) is not None]
    if not ways:
        return None
    if len(times) < len(ways):
        return Placements(tuple(ways), None)
    thrifty = _from_disk(trials, ways[times.index(min(times))], probe, min(times))
    return Placements((*ways, thrifty) if thrifty else tuple(ways), min(times))


def _within(seconds: float | None, fastest: float) -> bool:
    return seconds is not None and seconds <= fastest * (1 + TIE)


def _bound(trials: Trials, base: Strategy) -> float | None:
    """Seconds that no strategy can beat: the resident transformer's and the VAE's; None: unknown."""
    stages = [whole_transformer(trials, base), *(trials.of(name, base) for name in vae_halves(trials.request))]
    return total_seconds(trials.request, stages)


def _encoders_fit(trials: Trials, strategy: Strategy) -> bool:
    return trials.fits(strategy, *(name for name in components_of(trials.request) if name in ENCODERS))


def _start(trials: Trials, base: Strategy, home: str) -> Strategy | None:
    """Blocks streamed from `home`, with T5 where it fits."""
    block = knobs.FROM[home].on(base)
    return next((s for s in (block, knobs.T5_CPU.set(block, True)) if _encoders_fit(trials, s)), None)


def _disk_probes(trials: Trials, base: Strategy) -> Iterator[Strategy]:
    """Every block streamed from disk, activations saved only as far as must be; then with fewer passes over the disk."""
    start = _start(trials, base, "disk")
    if start is None:
        return
    first = next((way for way in worth_trying(trials, start) if trials.fits(way, "dit")), None)
    if first is None:
        return
    yield first
    yield from (way for change in knobs.fewer_passes(first) if trials.fits(way := change.on(first), "dit"))


def _streamed(trials: Trials, base: Strategy) -> Strategy | None:
    """Blocks streamed from the fastest place that holds them. Pinned RAM costs the device page tables, 64 MiB for 31 GiB."""
    for home in knobs.WEIGHT_HOMES:
        fitting = _start(trials, base, home)
        found = fastest_streamed(trials, fitting) if fitting is not None else None
        if found is not None:
            return found
    return None


def _from_disk(trials: Trials, fastest: Strategy, probe: Strategy | None, seconds: float) -> Strategy | None:
    """The fastest way with its blocks on disk instead of in RAM, if it fits and what is known of the disk lets hope for a tie.

    What a step waits for the disk falls with every resident block, and with the passes over the weights that it takes.
    """
    if probe is None or not knobs.is_streamed(fastest) or knobs.WEIGHTS_IN.of(fastest) == "disk":
        return None
    step, resident = (trials.of("dit", probe).seconds_per_step, whole_transformer(trials, probe).seconds_per_step)
    if step is None or resident is None:
        return None
    streamed = 1 - knobs.RESIDENT_BLOCKS.of(fastest) / block_count(trials.request)
    now, then = (knobs.weight_passes(way, guided=trials.request.guided) for way in (probe, fastest))
    waiting = (step - resident) * streamed * then / now * steps_of(trials.request, knobs.BATCH_SIZE.of(fastest))
    if waiting > 2 * TIE * seconds:
        return None
    way = knobs.T5_CPU.set(knobs.WEIGHTS_IN.set(fastest, "disk"), knobs.T5_CPU.of(probe))
    return way if trials.fits(way, "dit") and _encoders_fit(trials, way) else None

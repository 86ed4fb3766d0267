"""When nothing fits: the smallest budget that would, and which smaller size or fewer frames fit this one. No torch."""

from __future__ import annotations

from dataclasses import replace

from wanvram import knobs
from wanvram.command_line import plan_command
from wanvram.config import Request, Strategy
from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import StageForecast, Trials, components_of
from wanvram.planner.result import Alternative, Refusal
from wanvram.planner.tiles import tiles_for
from wanvram.planner.transformer import leanest, variants
from wanvram.units import exact, human

__all__ = ["least_peak", "refuse"]


def refuse(trials: Trials, base: Strategy) -> Refusal:
    """Explains with forecasts of the leanest strategies; `base` carries what the user fixed (precision, storage)."""
    peaks = {component: least_peak(trials, base, component) for component in components_of(trials.request)}
    component = max(peaks, key=lambda name: peaks[name])
    if peaks[component] <= trials.budget.device_limit:
        return _refuse_for_host(trials, base)
    smallest = trials.budget.smallest_for(peaks[component])
    alternatives = tuple(_alternatives(trials, base, component))
    return Refusal(
        trials.request,
        trials.budget,
        "device",
        component,
        smallest,
        alternatives,
        _message(trials, component, smallest, alternatives),
        tuple(_command(trials, base, alternative) for alternative in alternatives),
    )


def _refuse_for_host(trials: Trials, base: Strategy) -> Refusal:
    """The device would do, but no way to keep the weights fits host RAM beside it."""
    needed = {name: min(_host_bytes(trials, base, name)) for name in components_of(trials.request)}
    component = max(needed, key=lambda name: needed[name])
    smallest = trials.budget.smallest_ram(needed[component])
    given = human(trials.budget.ram_bytes or 0)
    message = (
        f"within {human(trials.budget.usable_bytes)} of device memory the {component} needs {human(smallest)} of host RAM with "
        f"what is kept for the system, but --ram is {given}; give more of either"
    )
    return Refusal(trials.request, trials.budget, "host", component, smallest, (), message)


def _host_bytes(trials: Trials, base: Strategy, component: str) -> list[int]:
    """Of the lean strategies that fit the device."""
    found = [trials.of(component, strategy) for strategy in _lean(trials, base, component)]
    return [forecast.host_bytes for forecast in found if forecast.peak_device_bytes <= trials.budget.device_limit]


def _is_held(trials: Trials, forecast: StageForecast) -> bool:
    return forecast.host_bytes <= trials.budget.host_limit("disk")


def _lean(trials: Trials, base: Strategy, component: str) -> list[Strategy]:
    """The lossless strategies among which a component's smallest peak is; also one without a stream in RAM where RAM cannot hold it."""
    request, block = trials.request, knobs.FROM["disk"].on(base)
    if request.facts.family.component_of(component).name == "vae":
        return [knobs.VAE_TILE.set(base, tiles_for(request)[-1])]
    if component == "text_encoder":
        return [block, knobs.T5_CPU.set(base, True)]
    if component == "image_encoder":
        return [block]
    least = leanest(request, block)
    return [least] if _is_held(trials, trials.of("dit", least)) else [least, variants(request, block)[-1]]


def least_peak(trials: Trials, base: Strategy, component: str) -> int:
    """Device memory of a component with every lossless saving that host RAM allows; with all of them where it allows none."""
    ways = [trials.of(component, strategy) for strategy in _lean(trials, base, component)]
    return min(way.peak_device_bytes for way in [way for way in ways if _is_held(trials, way)] or ways)


def _alternative(trials: Trials, base: Strategy, size: str, frames: int, first: str) -> Alternative | None:
    """Forecast component by component until one does not fit; `first` is the one that most likely does not."""
    other = trials.for_request(size=size, frame_num=frames)
    peaks = []
    for component in sorted(components_of(other.request), key=lambda name: name != first):
        peaks.append(least_peak(other, base, component))
        if peaks[-1] > other.budget.device_limit:
            return None
    return Alternative(size, frames, max(peaks))


def _alternatives(trials: Trials, base: Strategy, first: str) -> list[Alternative]:
    """The next smaller sizes at these frames, and the most frames at this size; fewer frames of the smallest, if neither."""
    request = trials.request
    sizes = _smaller_sizes(request)
    found = [_alternative(trials, base, size, request.frame_num, first) for size in sizes]
    found.append(_most_frames(trials, base, request.size, first))
    if not any(found) and sizes:
        found.append(_most_frames(trials, base, sizes[-1], first))
    return [alternative for alternative in found if alternative is not None]


def _smaller_sizes(request: Request) -> list[str]:
    """Of the same orientation, the largest first."""

    def shape(size: str) -> tuple[bool, int]:
        """Whether it is wide, and its pixels."""
        width, height = map(int, size.split("*"))
        return width >= height, width * height

    wide, pixels = shape(request.size)
    smaller = [size for size in request.facts.sizes if shape(size)[0] == wide and shape(size)[1] < pixels]
    return sorted(smaller, key=shape, reverse=True)


def _most_frames(trials: Trials, base: Strategy, size: str, first: str) -> Alternative | None:
    """By bisection over the numbers of latent frames below the request's."""
    geometry = trials.request.geometry
    low = geometry.latent_frames(trials.request.facts.least_frames) - 1
    high = geometry.latent_frames(trials.request.frame_num)
    best: Alternative | None = None
    while high - low > 1:
        middle = (low + high) // 2
        fits = _alternative(trials, base, size, geometry.video_frames(middle), first)
        if fits is None:
            high = middle
        else:
            low, best = middle, fits
    return best


def _message(trials: Trials, component: str, smallest: int, alternatives: tuple[Alternative, ...]) -> str:
    r, budget = trials.request, trials.budget
    text = (
        f"{r.task} {r.size} with {r.frame_num} frames does not fit {human(budget.usable_bytes)}: the {component} needs a budget "
        f"of {human(smallest)} even with every lossless saving{_allowed_by_ram(budget)} (margin included)"
    )
    if smallest > budget.card.total_bytes:
        text += f", more than the {budget.card.name} has"
    changes = [_flags(r, a) for a in alternatives]
    return text + ("; it would fit with " + ", or with ".join(changes) if changes else "")


def _allowed_by_ram(budget: Budget) -> str:
    return "" if budget.ram_bytes is None else f" that {human(budget.ram_bytes)} of host RAM allow"


def _flags(request: Request, alternative: Alternative) -> str:
    size = f"--size {alternative.size}" if alternative.size != request.size else ""
    frames = f"--frame_num {alternative.frame_num}" if alternative.frame_num != request.frame_num else ""
    return " ".join(part for part in (size, frames) if part)


def _command(trials: Trials, base: Strategy, alternative: Alternative) -> str:
    """The same request with that size and number of frames, for the same budget."""
    budget = trials.budget
    request = replace(trials.request, size=alternative.size, frame_num=alternative.frame_num)
    ram = None if budget.ram_bytes is None else exact(budget.ram_bytes)
    vram, card = exact(budget.vram_bytes), budget.card.argument
    return plan_command(request, base, vram=vram, ram=ram, gpu=card, link=budget.link)

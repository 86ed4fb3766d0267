"""What one component would cost under one Strategy, asked for once per choice that matters to it. No torch.

The simulation itself is injected: the planner decides what to ask, `run` knows how to answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from wanvram import knobs
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.knobs import Situation
from wanvram.planner.budget import Budget

__all__ = [
    "ENCODERS",
    "Forecast",
    "StageForecast",
    "Trial",
    "Trials",
    "choices",
    "components_of",
    "seconds_gained",
    "situation",
    "stage_seconds",
    "steps_of",
    "summed",
    "total_seconds",
    "vae_halves",
]


ENCODERS = ("text_encoder", "image_encoder")  # their memory does not depend on the number of frames


@dataclass(frozen=True)
class StageForecast:
    """A component from its loading to its release, alone on the device with what earlier stages hand to it.

    Every peak includes loading; device is the driver's view with CUDA context and libraries. base_bytes: its weights on
    the device once loaded. host_bytes: weights and copies of them in host RAM, pinned or not, at most. seconds: loading and
    stage over all videos, without denoising steps. seconds_per_step: a steady denoising step (dit only). None: unknown.
    together: videos that such a step advances.
    """

    component: str
    peak_device_bytes: int
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    base_bytes: int
    host_bytes: int
    seconds_per_step: float | None
    seconds: float | None
    together: int = 1


# (config, component) -> its forecast. The device has as much memory as it takes: a forecast never runs out of memory.
Forecast = Callable[[RunConfig, str], StageForecast]


def situation(request: Request, half: str = "bf16") -> Situation:
    """half: of the card; of no account to knobs that lose nothing."""
    shape = request.geometry.latent_shape(request.frame_num, request.height, request.width)
    streams = 2 if request.facts.takes_source else 1
    return Situation(request.geometry.tokens(shape), max(shape[2:]), half, streams)


def choices(component: str, strategy: Strategy) -> tuple[object, ...]:
    """What decides a component's forecast: its name and the values of the knobs that touch it."""
    return component, *(knob.of(strategy) for knob in knobs.touching(component))


def components_of(request: Request) -> tuple[str, ...]:
    """In the order of their stages; `vae_encoder` and `vae_decoder` are the halves of the VAE, loaded one at a time."""
    return tuple(part.name for part in request.facts.parts())


def vae_halves(request: Request) -> tuple[str, ...]:
    """Those of them that it uses."""
    return tuple(part.name for part in request.facts.parts() if part.component == "vae")


def total_seconds(request: Request, stages: Iterable[StageForecast]) -> float | None:
    """text + image + encode + steps x step + decode, over all videos; None if any part is unknown."""
    return summed(stage_seconds(request, stage) for stage in stages)


def summed(times: Iterable[float | None]) -> float | None:
    """None if one of them is unknown."""
    known = [*times]
    return None if None in known else sum((time for time in known if time is not None), 0.0)


def seconds_gained(request: Request, now: Iterable[StageForecast], then: Iterable[StageForecast]) -> float | None:
    """Of the whole run; None if either time is unknown."""
    before, after = total_seconds(request, now), total_seconds(request, then)
    return None if before is None or after is None else before - after


def stage_seconds(request: Request, stage: StageForecast) -> float | None:
    """The whole stage, steps included."""
    if stage.component != "dit":
        return stage.seconds
    if stage.seconds is None or stage.seconds_per_step is None:
        return None
    return stage.seconds + stage.seconds_per_step * steps_of(request, stage.together)


def steps_of(request: Request, together: int) -> float:
    """Denoising steps of the whole run, each of so many videos: a step of fewer counts as the part that it is."""
    return request.sample_steps * len(request.videos(together)) / together


@dataclass(frozen=True)
class Trial:
    """A choice that was considered and does not fit: `needed` bytes of `memory` (device or host) against `limit`.

    forecast None: known not to fit without a simulation, so its time is unknown.
    """

    component: str
    strategy: Strategy
    memory: str
    needed: int
    limit: int
    forecast: StageForecast | None


@dataclass
class Trials:
    """The forecasts of one request, cached, checked against the budget, with a list of what did not fit."""

    request: Request
    budget: Budget
    forecast: Forecast
    failed: list[Trial] = field(default_factory=list)
    _known: dict[tuple[object, ...], StageForecast] = field(default_factory=dict)

    def of(self, component: str, strategy: Strategy) -> StageForecast:
        key = choices(component, strategy)
        if key not in self._known:
            self._known[key] = self.forecast(self._config(strategy), component)
        return self._known[key]

    def known(self, component: str, strategy: Strategy) -> StageForecast | None:
        """What was already forecast."""
        return self._known.get(choices(component, strategy))

    def fits_device(self, component: str, strategy: Strategy) -> bool:
        forecast = self.of(component, strategy)
        needed, limit = forecast.peak_device_bytes, self.budget.device_limit
        if needed > limit:
            self.failed.append(Trial(component, strategy, "device", needed, limit, forecast))
        return needed <= limit

    def fits_host(self, component: str, strategy: Strategy) -> bool:
        forecast = self.of(component, strategy)
        streamed = knobs.is_streamed(strategy) and not (knobs.T5_CPU.of(strategy) and component == "text_encoder")
        limit = self.budget.host_limit(knobs.WEIGHTS_IN.of(strategy) if streamed else "pageable")
        needed = forecast.host_bytes
        if needed > limit:
            self.failed.append(Trial(component, strategy, "host", needed, int(limit), forecast))
        return needed <= limit

    def fits(self, strategy: Strategy, *components: str) -> bool:
        """The device and the host, asked until one does not."""
        return all(self.fits_device(name, strategy) and self.fits_host(name, strategy) for name in components)

    def peak(self, strategy: Strategy) -> int:
        """Device memory of the whole run."""
        return max(stage.peak_device_bytes for stage in self.stages(strategy))

    def host(self, strategy: Strategy) -> int:
        """Weights in host RAM, of the component that has most there."""
        return max(stage.host_bytes for stage in self.stages(strategy))

    def stages(self, strategy: Strategy) -> tuple[StageForecast, ...]:
        return tuple(self.of(component, strategy) for component in components_of(self.request))

    def seconds(self, strategy: Strategy) -> float | None:
        return total_seconds(self.request, self.stages(strategy))

    def for_request(self, **changes: object) -> Trials:
        """The same question for another size or number of frames."""
        return Trials(replace(self.request, **changes), self.budget, self.forecast)  # type: ignore[arg-type]

    def _config(self, strategy: Strategy) -> RunConfig:
        return RunConfig(
            name="plan",
            description="",
            device="simulated",
            request=self.request,
            strategy=strategy,
            measurement=Measurement(profile_memory=False),
            gpu=self.budget.gpu,
            link=self.budget.link,
        )

"""Advice by simulation: which changes of strategy lower a run's peak most, each tried on the simulated device.

A forecast of the components that a change touches estimates what it can save; the most promising are then simulated whole, and
only what that says is given as advice. Savings are differences of two predictions, also for a measured run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from wanvram import knobs
from wanvram.advice import Advice
from wanvram.command_line import flag_of
from wanvram.config import Measurement, RunConfig, Strategy
from wanvram.errors import WanvramError
from wanvram.planner import StageForecast
from wanvram.planner.forecasts import Forecast, choices, components_of, situation, stage_seconds, summed
from wanvram.predict.simulate import simulate
from wanvram.predict.stage import simulate_stage
from wanvram.record import RunRecord, dotted
from wanvram.simulate.gpus import DEFAULT_GPU, GPU, card_of_run, find_gpu

__all__ = ["advise", "predict"]

NEARLY = 0.95


# (config, unlimited) -> the whole run; unlimited: on a card of any size.
Predict = Callable[[RunConfig, bool], RunRecord]


def predict(config: RunConfig, unlimited: bool) -> RunRecord:
    """The whole run, also on a card that is as large as it takes. WanvramError if it ends early for want of anything but memory."""
    if unlimited:
        config = replace(config, memory_limit_bytes=None)
    record, _ = simulate(config, unlimited=unlimited)
    if record.failure is not None and record.failure.kind != "oom":
        raise WanvramError(f"the run could not be simulated to its end: {record.failure.message}")
    return record


def advise(
    config: RunConfig,
    record: RunRecord,
    *,
    count: int = 3,
    show: Callable[[str], None] | None = None,
    forecast: Forecast = simulate_stage,
    predict: Predict = predict,
) -> list[Advice]:
    """The `count` single changes that lower the device peak of `record`, a run of `config`, most; one per knob: of
    its values that save within 5 % of the most, the fastest.

    Of those that save the same, lossless ones come first, then the fastest. Fewer than `count` if fewer lower it. A run that
    did not fit is compared on a card without limit. Raises InputError if the record's card is unknown to the simulator.
    """
    measurement = Measurement(profile_memory=False)  # spans of single blocks change no peak and cost a second a run
    config = replace(config, device="simulated", gpu=_card(config, record).argument, measurement=measurement)
    base = _reused(config, record) or predict(config, False)
    unlimited = base.failure is not None
    if unlimited:
        base = predict(config, True)
    runs = _Runs(config, base, unlimited, predict, forecast)
    estimates = [estimate for change in _changes(config) if (estimate := _estimate(runs, change)).saved_bytes > 0]
    advices = _best(runs, _ranked(estimates), count, show)
    return [replace(advice, fits=_fits(runs, advice)) for advice in advices] if unlimited else advices


def _card(config: RunConfig, record: RunRecord) -> GPU:
    """The card the run was on: of several sizes of one name the one whose memory the record states."""
    total = record.environment.get("gpu_total_bytes")
    name = record.device.partition(":")[2] or config.gpu or DEFAULT_GPU
    return card_of_run(record.device, config.gpu) or find_gpu(name, total if type(total) is int else None)


def _reused(config: RunConfig, record: RunRecord) -> RunRecord | None:
    """The record itself, if it is a whole simulation of this configuration."""
    same = _settings(config.to_dict()) == _settings(record.config)
    whole = record.simulated and record.failure is None and bool(record.stages)
    if not (whole and same) or config.request.use_prompt_extend:
        return None
    return record


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What changes memory or time. The card is the record's; a random seed is drawn when the run begins."""
    sections = {name: config.get(name) or {} for name in ("model_config", "optimization", "request")}
    return {
        k: v
        for k, v in dotted(sections).items()
        if k not in ("model_config.device", "request.gpu", "request.base_seed")
    }


# --- what could be changed ---------------------------------------------------------------------------------------------------


def _changes(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Every single change that can lower a peak and is not made yet."""
    around = situation(config.request, find_gpu(config.gpu or DEFAULT_GPU).half)
    return ({knob.name: value} for knob, value in knobs.smaller_values(config.strategy, around))


def _is_lossy(change: dict[str, Any]) -> bool:
    return any(knob.name in change for knob in knobs.lossy())


# --- how much it could save --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Estimate:
    """What a change takes off the run's device peak and adds in seconds, before it is simulated whole."""

    knobs: dict[str, Any]
    saved_bytes: int
    seconds: float


@dataclass
class _Runs:
    """The base run, and forecasts and whole runs of others, each made once."""

    config: RunConfig
    base: RunRecord
    unlimited: bool
    predict: Predict
    forecast: Forecast
    _forecasts: dict[tuple[object, ...], StageForecast] = field(default_factory=dict)
    _wholes: dict[Strategy, RunRecord] = field(default_factory=dict)

    def whole(self, strategy: Strategy) -> RunRecord:
        if strategy not in self._wholes:
            self._wholes[strategy] = self.predict(replace(self.config, strategy=strategy), self.unlimited)
        return self._wholes[strategy]

    def stage(self, strategy: Strategy, component: str) -> StageForecast:
        key = choices(component, strategy)
        if key not in self._forecasts:
            asked = replace(self.config, strategy=strategy, memory_limit_bytes=None)
            self._forecasts[key] = self.forecast(asked, component)
        return self._forecasts[key]

    def peaks(self, *, holes: bool) -> dict[str, int]:
        """The base run's device peak by component, largest first; `holes`: what was reserved and not allocated counts."""
        result: dict[str, int] = {}
        for span in self.base.all_stages():
            unused = 0 if holes else span.peak.reserved_bytes - span.peak.allocated_bytes
            name = span.planned
            result[name] = max(result.get(name, 0), (span.peak.device_bytes or 0) - unused)
        return dict(sorted(result.items(), key=lambda item: -item[1]))


def _estimate(runs: _Runs, change: dict[str, Any]) -> _Estimate:
    strategy = replace(runs.config.strategy, **change)
    if runs.config.weights == "tiny":  # forecasts are of full-size models; a tiny run takes no longer than one of them
        whole = runs.whole(strategy)
        return _Estimate(change, 0 if whole.failure else _device_bytes(runs.base) - _device_bytes(whole), 0.0)
    if knobs.EXPANDABLE_SEGMENTS.name in change:
        return _Estimate(change, _highest(runs.peaks(holes=True)) - _highest(runs.peaks(holes=False)), 0.0)
    if knobs.OFFLOAD.name in change:
        return _Estimate(change, _highest(runs.peaks(holes=False)) - _highest(_alone(runs)), 0.0)
    return _staged(runs, change, strategy)


def _highest(peaks: dict[str, int]) -> int:
    return max(peaks.values())


def _alone(runs: _Runs) -> dict[str, int]:
    """Peaks without the weights of all other components; the prompt extender is alone in any case."""
    bases = {c.name: c.base_bytes for c in runs.base.components}
    total, peaks = sum(bases.values()), runs.peaks(holes=False)
    whole = {name: "vae" if name.startswith("vae") else name for name in peaks}
    return {name: peak - total + bases.get(whole[name], total) for name, peak in peaks.items()}


def _staged(runs: _Runs, change: dict[str, Any], strategy: Strategy) -> _Estimate:
    """From base peaks and what the forecasts of the touched components differ by.

    Without offload the weights of all count everywhere, and what one stage reserved is still reserved in the next, so that only
    allocated memory tells the stages apart.
    """
    base = runs.config.strategy
    offload = knobs.OFFLOAD.of(base)
    peaks = runs.peaks(holes=offload)
    touched = [c for c in components_of(runs.config.request) if choices(c, base) != choices(c, strategy)]
    grown: dict[str, int] = {}
    if not offload:
        grown = {c: runs.stage(strategy, c).base_bytes - runs.stage(base, c).base_bytes for c in touched}
    highest, seconds = 0, 0.0
    for name, peak in peaks.items():
        if peak <= highest:
            break  # no change here raises a peak: the others stay below, whatever they save
        peak += sum(nbytes for other, nbytes in grown.items() if other != name and knobs.touching(name))
        if name in touched:
            before, after = runs.stage(base, name), runs.stage(strategy, name)
            peak += _peak(after, offload) - _peak(before, offload)
            times = [stage_seconds(runs.config.request, stage) or 0.0 for stage in (before, after)]
            seconds += times[1] - times[0]
        highest = max(highest, peak)
    return _Estimate(change, _highest(peaks) - highest, seconds)


def _peak(stage: StageForecast, holes: bool) -> int:
    return stage.peak_device_bytes if holes else stage.peak_allocated_bytes


def _ranked(estimates: list[_Estimate]) -> list[_Estimate]:
    """Largest saving first; of one knob's values, the fastest of those that save nearly the most stands for the knob.

    Tiles of 20 save 2 % more than tiles of 30 and cost eight times as much (t2v-1.3B 832x480, simulated).
    """
    chosen = []
    for knob in {next(iter(e.knobs)): None for e in estimates}:
        same = [e for e in estimates if knob in e.knobs]
        enough = NEARLY * max(e.saved_bytes for e in same)
        chosen.append(min((e for e in same if e.saved_bytes >= enough), key=lambda e: (e.seconds, -e.saved_bytes)))
    return sorted(chosen, key=lambda e: (-e.saved_bytes, _is_lossy(e.knobs), e.seconds))


# --- what it does save -------------------------------------------------------------------------------------------------------


def _best(runs: _Runs, estimates: list[_Estimate], count: int, show: Callable[[str], None] | None) -> list[Advice]:
    """Simulates whole, best first, until no further estimate promises more than the `count`-th best that was found."""
    found: list[Advice] = []
    for estimate in estimates:
        if len(found) >= count and estimate.saved_bytes <= found[count - 1].saved_bytes:
            break
        advice = _advice(runs, estimate.knobs)
        if advice is not None:
            found.append(advice)
            if show is not None:
                show(f"{advice.change}: {advice.saved_bytes / 2**30:.2f} GiB less")
        found.sort(key=lambda a: (-a.saved_bytes, not a.lossless, a.seconds or 0.0))
    return found[:count]


def _fits(runs: _Runs, advice: Advice) -> bool:
    """Run with the limit: on a card that runs short the allocator gives back what it only keeps, so the peak cannot tell."""
    strategy = replace(runs.config.strategy, **advice.knobs)
    return runs.predict(replace(runs.config, strategy=strategy), False).failure is None


def _advice(runs: _Runs, change: dict[str, Any]) -> Advice | None:
    """None if the whole run saves nothing."""
    base, after = runs.base, runs.whole(replace(runs.config.strategy, **change))
    if after.failure is not None or _device_bytes(after) >= _device_bytes(base):
        return None
    times, where = (_stage_seconds(base), _stage_seconds(after)), after.peak_span()
    return Advice(
        change=" ".join(f"{flag_of(name)} {value}" for name, value in change.items()),
        saved_bytes=_device_bytes(base) - _device_bytes(after),
        seconds=None if times[0] is None or times[1] is None else round(times[1] - times[0], 3),
        lossless=not _is_lossy(change),
        base_device_bytes=_device_bytes(base),
        peak_device_bytes=_device_bytes(after),
        knobs=change,
        saved_allocated_bytes=_allocated_bytes(base) - _allocated_bytes(after),
        peak_stage_after=where.name if where else None,
    )


def _device_bytes(record: RunRecord) -> int:
    return max(span.peak.device_bytes or 0 for span in record.all_stages())


def _allocated_bytes(record: RunRecord) -> int:
    return max(span.peak.allocated_bytes for span in record.all_stages())


def _stage_seconds(record: RunRecord) -> float | None:
    """All stages; loading depends on the disk."""
    return summed(span.seconds for span in record.stages if span.kind == "stage")

"""A plan as text: does it fit, how long does it take, which knobs, why not the faster ones, what would cost quality. No torch."""

from __future__ import annotations

from typing import Any

from wanvram.planner.forecasts import StageForecast, stage_seconds
from wanvram.planner.result import Offer, Plan, Rejected, changed_knobs
from wanvram.report.terminal import table
from wanvram.units import gib, human, seconds

__all__ = ["flags_of", "summarize_plan"]

# What the command line assumes when a flag is absent differs from Strategy(): these are always said.
ALWAYS = ("precision", "load_strategy", "offload")
LEAST_SECONDS = 0.1  # of a whole run; below that a time is not worth a word
ABSENT = {"vae_tile": "none (whole frames)", "rows_per_chunk": "chosen by size"}


def summarize_plan(plan: Plan) -> str:
    """Multi-line text; exact for a given plan."""
    parts = [_headline(plan), "", f"strategy: {flags_of(plan)}", "", _stages(plan)]
    if plan.rejected:
        parts += ["", "faster, but too large:", *(f"  {_rejected(r)}" for r in plan.rejected)]
    if plan.offers:
        parts += ["", "lossy, not used:", *(f"  {_offer(o)}" for o in plan.offers)]
    if plan.notes:
        parts += ["", *(f"note: {note}" for note in plan.notes)]
    return "\n".join(parts) + "\n"


def flags_of(plan: Plan) -> str:
    """The strategy as flags of generate."""
    knobs = {name: getattr(plan.strategy, name) for name in ALWAYS} | changed_knobs(plan.strategy)
    return " ".join(f"--{'offload_model' if name == 'offload' else name} {value}" for name, value in knobs.items())


def _headline(plan: Plan) -> str:
    r, budget = plan.request, plan.budget
    spare = budget.usable_bytes - plan.peak_device_bytes
    step = "unknown" if plan.seconds_per_step is None else seconds(plan.seconds_per_step)
    whole = "unknown" if plan.seconds is None else seconds(plan.seconds)
    ram = "" if budget.ram_bytes is None else f" of {gib(budget.ram_bytes)}"
    return "\n".join(
        [
            f"{r.task} {r.size} {r.frame_num} frames, {r.sample_steps} steps, predicted for {budget.card.name}",
            f"Fits in {gib(budget.usable_bytes)}: device memory {gib(plan.peak_device_bytes)}, {human(spare)} to spare "
            f"(margin kept: {human(budget.margin)})",
            f"Time: {step} per step, {whole} in all",
            f"Host RAM: {gib(plan.host_bytes)}{ram}",
        ]
    )


def _stages(plan: Plan) -> str:
    rows = [["component", "weights", "device peak", "host weights", "time"]]
    rows += [_row(plan, stage) for stage in plan.stages]
    return table(rows)


def _row(plan: Plan, stage: StageForecast) -> list[str]:
    time = stage_seconds(plan.request, stage)
    sizes = (stage.base_bytes, stage.peak_device_bytes, stage.host_bytes)
    return [stage.component, *(gib(size) for size in sizes), "-" if time is None else seconds(time)]


def _rejected(r: Rejected) -> str:
    where = "device memory" if r.memory == "device" else "host RAM for weights"
    gain = "time gained unknown" if r.seconds_gained is None else f"would save {seconds(r.seconds_gained)}"
    return f"{r.component}: {_change(r.change)} needs {gib(r.needed_bytes)} of {where}, {gib(r.limit_bytes)} allowed; {gain}"


def _offer(o: Offer) -> str:
    effects = [
        _effect(o.device_saved_bytes, f"device memory of the {o.component}"),
        _effect(o.peak_saved_bytes, "the run's peak"),
        _effect(o.host_saved_bytes, "host RAM"),
    ]
    if o.seconds_saved is not None and abs(o.seconds_saved) >= LEAST_SECONDS:
        effects.append(f"{'saves' if o.seconds_saved >= 0 else 'costs'} {seconds(abs(o.seconds_saved))}")
    flags = " ".join(f"--{name} {value}" for name, value in o.change.items())
    return f"{flags}: " + ", ".join(effect for effect in effects if effect)


def _effect(saved: int, what: str) -> str:
    return f"{human(abs(saved))} {'less' if saved > 0 else 'more'} of {what}" if saved else ""


def _change(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} {ABSENT[name] if value is None else value}" for name, value in change.items())

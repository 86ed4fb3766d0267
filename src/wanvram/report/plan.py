"""A plan as text: does it fit, how long does it take, the command, why nothing faster, what would cost quality. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wanvram import knobs
from wanvram.command_line import flag_of
from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import stage_seconds
from wanvram.planner.result import Offer, Plan, Rejected, Trade
from wanvram.report.terminal import attention_line, table
from wanvram.report.translations import Texts
from wanvram.simulate.links import link_of
from wanvram.units import human, mib_cell, seconds, seconds_cell

__all__ = ["longest_table", "summarize_plan"]

LEAST_SECONDS = 0.1  # of a whole run; below that a time is not worth a word
FRAMES_PER_SECOND = 16  # of every Wan2.1 video


def summarize_plan(plan: Plan, command: str) -> str:
    """Multi-line text; exact for a given plan. command: what runs it."""
    parts = [_headline(plan), "", "run it with:", f"  {command}", "", _stages(plan)]
    if plan.layouts:
        parts += [
            "",
            f"ways in which {plan.budget.gpus} GPUs can share it, by forecasts of the transformer alone:",
            "",
            _layouts(plan),
        ]
    if plan.rejected:
        parts += ["", "faster, but too large:", *(f"  {_rejected(r)}" for r in plan.rejected)]
    trades = [_trade(t) for t in plan.trades if t.seconds_gained >= LEAST_SECONDS]
    if trades:
        parts += ["", "faster by less than 1 %, not used:", *(f"  {trade}" for trade in trades)]
    if plan.offers:
        parts += ["", "lossy, not used:", *(f"  {_offer(o)}" for o in plan.offers)]
    if plan.notes:
        parts += ["", *(f"note: {note}" for note in plan.notes)]
    return "\n".join(parts) + "\n"


def _headline(plan: Plan) -> str:
    r, budget = plan.request, plan.budget
    spare = budget.usable_bytes - plan.peak_device_bytes
    step = "unknown" if plan.seconds_per_step is None else seconds(plan.seconds_per_step)
    whole = "unknown" if plan.seconds is None else seconds(plan.seconds)
    together = knobs.BATCH_SIZE.of(plan.strategy)
    count = len(r.videos(together))
    made = f", {count} videos, {together} together" if count > 1 else ""
    each = f", {seconds(plan.seconds / count)} a video" if count > 1 and plan.seconds is not None else ""
    ram = f" of {human(budget.ram_bytes)}, {human(budget.system)} kept for the system" if budget.ram_bytes else ""
    each_card = " of each" if budget.gpus > 1 else ""
    lines = [
        f"{r.task} {r.size} {r.frame_num} frames, {r.sample_steps} steps{made}, predicted for {_cards(budget)}",
        f"Fits in {human(budget.usable_bytes)}{each_card}: device memory {human(plan.peak_device_bytes)}, {human(spare)} to spare "
        f"(margin kept: {human(budget.margin)})",
        f"Time: {step} per step, {whole} in all{each}{_outside_stages(plan)}",
        f"Host RAM: {human(plan.host_bytes)}{ram}",
    ]
    if plan.attention is not None:
        lines += [attention_line(plan.attention, Texts()), f"  its time: {plan.attention.self_attention.rate_source}"]
    return "\n".join(lines)


def _cards(budget: Budget) -> str:
    if budget.gpus == 1:
        return budget.card.name
    return f"{budget.gpus} x {budget.card.name}, joined by {link_of(budget.card, budget.link, budget.gpus).name}"


def _layouts(plan: Plan) -> str:
    """One line for each, the most promising first."""
    rows = [[*plan.layouts[0].sizes, "step", "device MiB", "host weights MiB", "verdict"]]
    for layout in plan.layouts:
        sizes = map(mib_cell, (layout.peak_device_bytes, layout.host_bytes))
        rows.append([*map(str, layout.sizes.values()), seconds_cell(layout.seconds_per_step), *sizes, layout.verdict])
    return table(rows)


def _outside_stages(plan: Plan) -> str:
    """The whole command's time is more than its stages': Python and PyTorch start before them, the process ends after."""
    known = [stage_seconds(plan.request, stage) for stage in plan.stages]
    if plan.seconds is None or None in known:
        return ""
    rest = plan.seconds - sum(time for time in known if time is not None)
    if rest < LEAST_SECONDS:
        return ""
    return f", {seconds(rest)} of it the program's start, its end and what lies between the stages"


def _stages(plan: Plan) -> str:
    rows = [["component", "weights MiB", "device MiB", "host weights MiB", "time"]]
    for stage in plan.stages:
        sizes = (stage.base_bytes, stage.peak_device_bytes, stage.host_bytes)
        rows.append([stage.component, *map(mib_cell, sizes), seconds_cell(stage_seconds(plan.request, stage))])
    return table(rows)


def _rejected(r: Rejected) -> str:
    where = "device memory" if r.memory == "device" else "host RAM for weights"
    gain = "time gained unknown" if r.seconds_gained is None else f"would save {seconds(r.seconds_gained)}"
    needed, allowed = human(r.needed_bytes), human(r.limit_bytes)
    return f"{r.component}: {_change(r.change)} needs {needed} of {where}, {allowed} allowed; {gain}"


def _trade(t: Trade) -> str:
    effects = [_effect(-t.host_more_bytes, "host RAM"), _effect(-t.device_more_bytes, "device memory")]
    more = " and ".join(effect for effect in effects if effect) or "no more memory"
    return f"would be {seconds(t.seconds_gained)} faster with {more}: {_change(t.change)}"


def _offer(o: Offer) -> str:
    effects = [
        _effect(o.device_saved_bytes, f"device memory of the {o.component}"),
        _effect(o.peak_saved_bytes, "the run's peak"),
        _effect(o.host_saved_bytes, "host RAM"),
    ]
    if o.seconds_saved is not None and abs(o.seconds_saved) >= LEAST_SECONDS:
        effects.append(f"{'saves' if o.seconds_saved >= 0 else 'costs'} {seconds(abs(o.seconds_saved))}")
    flags = " ".join(f"{flag_of(name)} {value}" for name, value in o.change.items())
    return f"{flags}: " + ", ".join(effect for effect in effects if effect)


def _effect(saved: int, what: str) -> str:
    return f"{human(abs(saved))} {'less' if saved > 0 else 'more'} of {what}" if saved else ""


def _change(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(name, value)}" for name, value in change.items())


def _value(name: str, value: object) -> str:
    knob = knobs.named(name)
    return str(value) if knob is None else knob.shown(value)


def longest_table(plans: Sequence[tuple[str, Plan | None]], most: int) -> str:
    """(size, the plan with the most frames that fit, None: not even the fewest). most: frames that no video exceeds."""
    rows = [["size", "frames", "video", "device MiB", "host MiB", "step", "in all"]]
    for size, plan in plans:
        if plan is None:
            rows.append([size, "none fits", *["-"] * 5])
            continue
        frames = plan.request.frame_num
        said = f"{frames} (the most there are)" if frames == most else str(frames)
        sizes = map(mib_cell, (plan.peak_device_bytes, plan.host_bytes))
        times = map(seconds_cell, (plan.seconds_per_step, plan.seconds))
        rows.append([size, said, seconds(frames / FRAMES_PER_SECOND), *sizes, *times])
    return table(rows)

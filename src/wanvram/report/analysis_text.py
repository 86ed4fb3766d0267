"""What `wanvram analyze` says, as plain text: a run, a log of events, a torch.profiler trace, an allocator snapshot. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wanvram.analysis.events import EventGroup, EventSummary
from wanvram.analysis.peak import Moment, OwnerShare
from wanvram.analysis.snapshot import DeviceHistory, Snapshot
from wanvram.analysis.stages import Analysis, SpecMoments, Switch
from wanvram.analysis.trace import MemoryCurve, Operator, TraceSpan, TraceSummary
from wanvram.record import Memory, RunRecord
from wanvram.report.answer import advice_first, unlimited_base
from wanvram.report.runs import Advice
from wanvram.report.terminal import table
from wanvram.report.texts import Texts
from wanvram.units import human, mib_cell, seconds

__all__ = ["events_text", "run_text", "snapshot_text", "trace_text"]

MAX_NAME = 70
ROWS = 12


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _time(value: float | None) -> str:
    return "-" if value is None else seconds(value)


def _short(name: str) -> str:
    """A name in one line, its end kept: that is where paths and modules say most."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return line if len(line) <= MAX_NAME else "..." + line[3 - MAX_NAME :]


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(f"note: {note}" for note in notes)


# --- a run ---------------------------------------------------------------------------------------------------------------


def run_text(record: RunRecord, analysis: Analysis, advice: Sequence[Advice]) -> str:
    """The bottleneck first, then who owns it, components, stages, loading and switching, growth, advice."""
    name = record.config.get("name", "run") if isinstance(record.config, dict) else "run"
    kind = "predicted" if record.simulated else "measured"
    head = [f"{name} ({kind}, {record.device})"]
    if record.failure is not None:
        head.append(f"FAILED ({record.failure.kind}): {record.failure.message}")
    head.append(analysis.bottleneck.statement if analysis.bottleneck else "Nothing was recorded.")
    parts = ["\n".join(head), _owners(analysis), _components(analysis), _stages(analysis), _moments(analysis.moments)]
    parts += [
        _loading(analysis),
        _switches(analysis.switches),
        _growth(analysis),
        _advice(record, advice),
        _notes(record.notes),
    ]
    return _joined(parts)


def _owners(analysis: Analysis) -> str:
    if not analysis.peaks:
        return ""
    peak: Moment = analysis.peaks[0]
    rows = [["alive at the peak, by component", "count", "MiB", "share"], *map(_owner, peak.by_component)]
    tables = [rows]
    for title, owners in (("by stage", peak.by_stage), ("by module", peak.by_module), ("by shape", peak.by_shape)):
        tables.append([[title, "count", "MiB", "share"], *map(_owner, owners[:ROWS])])
    text = "\n\n".join(map(table, tables))
    return text + (f"\n\n{peak.unusable.reason}" if peak.unusable is not None else "")


def _owner(owner: OwnerShare) -> list[str]:
    return [_short(owner.name), f"{owner.count:,}", mib_cell(owner.bytes), _share(owner.share)]


def _components(analysis: Analysis) -> str:
    rows = [["component", "base MiB", "host MiB", "activation MiB", "streamed MiB", "hidden"]]
    for c in analysis.components:
        sizes = (c.base_bytes, c.host_bytes, c.activation_bytes, c.streamed_bytes)
        rows.append([c.name, *map(mib_cell, sizes), _share(c.hidden_share)])
    return table(rows) if len(rows) > 1 else ""


def _stages(analysis: Analysis) -> str:
    head = [
        "stage",
        "start MiB",
        "peak MiB",
        "activation MiB",
        "fluctuation MiB",
        "fragmentation",
        "highest",
        "time",
        "share",
    ]
    if not analysis.stages:
        return ""
    rows = [head]
    for s in analysis.stages:
        sizes = (s.start.allocated_bytes, s.peak.allocated_bytes, s.activation_bytes, s.fluctuation_bytes)
        shares = (s.fragmentation.at_peak, s.fragmentation.highest)
        rows.append([s.name, *map(mib_cell, sizes), *map(_share, shares), _time(s.seconds), _share(s.time_share)])
    total = f"Fragmentation: {_share(analysis.fragmentation_at_peak)} at the peak, at most {_share(analysis.fragmentation_highest)}."
    return f"{table(rows)}\n{total}"


def _moments(moments: SpecMoments) -> str:
    rows = [["moment", "allocated MiB", "reserved MiB", "device MiB"]]
    inside = f"inside the transformer ({moments.highest_block})" if moments.highest_block else "inside the transformer"
    places = (
        ("before the first forward pass", moments.before_forward),
        (inside, moments.inside_blocks),
        ("after vae.decode", moments.after_decode),
    )
    rows += [[name, *_memory(memory)] for name, memory in places if memory is not None]
    return table(rows) if len(rows) > 1 else ""


def _memory(memory: Memory) -> list[str]:
    return [mib_cell(memory.allocated_bytes), mib_cell(memory.reserved_bytes), mib_cell(memory.device_bytes)]


def _loading(analysis: Analysis) -> str:
    rows = [["loading", "added MiB", "beyond that, while loading MiB", "time"]]
    rows += [
        [load.component or "-", mib_cell(load.added_bytes), mib_cell(load.transient_bytes), _time(load.seconds)]
        for load in analysis.loading
    ]
    return table(rows) if len(rows) > 1 else ""


def _switches(switches: Sequence[Switch]) -> str:
    rows = [["switching", "before MiB", "after MiB", "given back MiB", "reserved given back MiB"]]
    for s in switches:
        given_back = (s.given_back_allocated_bytes, s.given_back_reserved_bytes)
        sizes = (s.before.allocated_bytes, s.after.allocated_bytes, *given_back)
        rows.append([f"{s.leaving or '-'} to {s.entering or '-'}", *map(mib_cell, sizes)])
    return table(rows) if len(rows) > 1 else ""


def _growth(analysis: Analysis) -> str:
    lines = []
    for growth in analysis.growth:
        steps = len(growth.allocated_bytes)
        if growth.leak:
            lines.append(
                f"LEAK in {growth.stage}: {human(growth.bytes_per_step)} more after every one of {steps} steps."
            )
        elif growth.leak is None and growth.steps > steps:
            few = f"{steps} of {growth.steps:,} steps were simulated, and the others repeat one of them"
            lines.append(f"Growth in {growth.stage}: cannot be told, since only {few}.")
        elif growth.leak is None:
            lines.append(f"Growth in {growth.stage}: {steps} steps are too few to tell.")
        else:
            lines.append(f"Growth in {growth.stage}: none over {steps} steps.")
    return "\n".join(lines)


def _advice(record: RunRecord, advice: Sequence[Advice]) -> str:
    """Lossless changes first. What is left and whether that fits in columns of their own where they are known."""
    if not advice:
        return ""
    advice = advice_first(advice)
    columns = {"what lowers the peak most (simulated)": [item.change for item in advice]}
    columns["saves MiB"] = [mib_cell(item.saved_bytes) for item in advice]
    if any(item.peak_device_bytes is not None for item in advice):
        columns["leaves MiB"] = [mib_cell(item.peak_device_bytes) for item in advice]
    columns["costs"] = [_time(item.seconds) for item in advice]
    if any(item.fits is not None for item in advice):
        columns["then fits"] = [{True: "yes", False: "no", None: "-"}[item.fits] for item in advice]
    text = table([list(columns), *map(list, zip(*columns.values(), strict=True))])
    base = unlimited_base(record, advice[0])
    if base is None:
        return text
    return f"{text}\n{Texts('en')('advice_base', base=human(base))}"


# --- events --------------------------------------------------------------------------------------------------------------


def events_text(summary: EventSummary) -> str:
    peak = summary.peak
    head = f"{summary.events:,} events, recorded within {seconds(summary.seconds)}."
    if peak is not None:
        head += f" Highest allocated: {human(peak.allocated_bytes or 0)} at '{_short(peak.name)}'."
    rows = [["event", "count", "allocated MiB", "reserved MiB", "device MiB", "increment MiB"]]
    rows += [_event(group) for group in summary.groups]
    growth = [["largest growth", "MiB"]]
    growth += [[f"{_short(g.after)} -> {_short(g.before)}", mib_cell(g.bytes)] for g in summary.growth]
    tables = [table(rows) if len(rows) > 1 else "", table(growth) if len(growth) > 1 else ""]
    return _joined([head, *tables, _notes(summary.notes)])


def _event(group: EventGroup) -> list[str]:
    figures = (group.allocated_bytes, group.reserved_bytes, group.device_bytes, group.incremental_bytes)
    return [_short(group.name), f"{group.count:,}", *map(mib_cell, figures)]


# --- a torch.profiler trace ----------------------------------------------------------------------------------------------


def trace_text(trace: TraceSummary) -> str:
    """Memory first, then operators by memory and time, kernels, steps."""
    head = f"{trace.path.name}: {trace.events:,} events in {seconds(trace.seconds)}."
    parts = [head, "\n".join(map(_curve, trace.memory))]
    parts.append(_operators("operators by memory allocated", trace.operators_by_memory))
    parts.append(_operators("operators by own time", trace.operators_by_time))
    kernels = [["kernels and copies", "calls", "time"]]
    kernels += [[_short(k.name), f"{k.calls:,}", _time(k.seconds)] for k in trace.kernels[:ROWS]]
    parts.append(table(kernels) if len(kernels) > 1 else "")
    parts.append(_spans("steps", trace.steps))
    parts.append(_spans("marked with record_function", trace.annotations))
    return _joined([*parts, _notes(trace.notes)])


def _curve(curve: MemoryCurve) -> str:
    return (
        f"{curve.device}: peak {human(curve.peak_allocated_bytes)} allocated at {curve.peak_seconds:.3f} s, with "
        f"{human(curve.reserved_at_peak_bytes)} reserved; peak reserved {human(curve.peak_reserved_bytes)}; fragmentation "
        f"{_share(curve.fragmentation_at_peak)} at the peak, {_share(curve.fragmentation_mean)} on average, "
        f"{_share(curve.fragmentation_max)} at most; fluctuation {human(curve.fluctuation_bytes)}."
    )


def _operators(title: str, operators: Sequence[Operator]) -> str:
    rows = [[title, "calls", "allocated MiB", "own time", "time"]]
    rows += [
        [_short(o.name), f"{o.calls:,}", mib_cell(o.allocated_bytes), _time(o.self_seconds), _time(o.seconds)]
        for o in operators[:ROWS]
    ]
    return table(rows) if len(rows) > 1 else ""


def _spans(title: str, spans: Sequence[TraceSpan]) -> str:
    rows = [[title, "start", "time", "peak allocated MiB", "peak reserved MiB"]]
    for span in spans[:ROWS]:
        times = [f"{span.start:.3f} s", _time(span.end - span.start)]
        rows.append(
            [_short(span.name), *times, mib_cell(span.peak_allocated_bytes), mib_cell(span.peak_reserved_bytes)]
        )
    more = f"\n... and {len(spans) - ROWS:,} more" if len(spans) > ROWS else ""
    return table(rows) + more if len(rows) > 1 else ""


# --- an allocator snapshot -----------------------------------------------------------------------------------------------


def snapshot_text(snapshot: Snapshot) -> str:
    """The device with the highest peak in full, the others in a line each."""
    main = snapshot.main
    lines = [_history(history) for history in sorted(snapshot.devices, key=lambda h: h is not main)]
    alive = [["alive at the peak, by where it was allocated", "count", "MiB", "share"]]
    total = max(1, main.peak.allocated_bytes)
    alive += [
        [_short(group.where), f"{group.count:,}", mib_cell(group.bytes), _share(group.bytes / total)]
        for group in main.peak.alive[:ROWS]
    ]
    holes = [["reserved but not in use at the peak", "MiB"]]
    by_reason: dict[str, int] = {}
    for hole in main.peak.holes:
        why = "beside live blocks" if hole.why.startswith("beside live") else hole.why
        by_reason[why] = by_reason.get(why, 0) + hole.bytes
    holes += [[why, mib_cell(size)] for why, size in sorted(by_reason.items(), key=lambda item: -item[1])[:ROWS]]
    refused = [
        f"out of memory at {r.seconds:.3f} s: {human(r.requested_bytes)} asked for, the driver had {human(r.free_bytes)} free"
        for r in main.out_of_memory[:ROWS]
    ]
    tables = [table(rows) if len(rows) > 1 else "" for rows in (alive, holes)]
    return _joined(["\n".join(lines), "\n".join(refused), *tables, _notes(snapshot.notes)])


def _history(history: DeviceHistory) -> str:
    peak = history.peak
    unused = peak.reserved_bytes - peak.allocated_bytes
    text = (
        f"GPU {history.device}: peak {human(peak.allocated_bytes)} allocated ({peak.allocated_bytes:,} bytes) at "
        f"{peak.seconds:.3f} s, {human(peak.reserved_bytes)} reserved there ({human(unused)} not in use); peak reserved "
        f"{human(history.peak_reserved_bytes)}; at the end {human(history.allocated_bytes)} allocated, "
        f"{human(history.reserved_bytes)} reserved; {history.events:,} events."
    )
    return text if history.complete else text + " Its history is incomplete."

"""What `wanvram analyze` says, as plain text: a run, a log of events, a torch.profiler trace, an allocator snapshot. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple

from wanvram.advice import Advice
from wanvram.analysis.events import EventSummary
from wanvram.analysis.snapshot import DeviceHistory, HostMemory, Snapshot
from wanvram.analysis.stages import Analysis, SpecMoments, Switch
from wanvram.analysis.trace_summary import MemoryCurve, Operator, TraceSpan, TraceSummary
from wanvram.foreign_text import shown
from wanvram.record import RunRecord
from wanvram.report.findings import advice_first, unlimited_base
from wanvram.report.terminal import listed, table
from wanvram.report.translations import Texts
from wanvram.units import human, mib, mib_cell, seconds, seconds_cell

__all__ = ["events_text", "run_text", "snapshot_text", "trace_text"]

MAX_NAME = 70
ROWS = 12


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _short(name: str) -> str:
    """A name in one line, its end kept: that is where paths and modules say most."""
    line = " ".join(shown(name).split())
    return line if len(line) <= MAX_NAME else "..." + line[3 - MAX_NAME :]


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(f"note: {shown(note)}" for note in notes)


# --- a run ---------------------------------------------------------------------------------------------------------------


def run_text(record: RunRecord, analysis: Analysis, advice: Sequence[Advice]) -> str:
    """The bottleneck first, then who owns it, components, stages, loading and switching, growth, advice."""
    name = shown(record.config.get("name") or "run")
    kind = "predicted" if record.simulated else "measured"
    head = [f"{name} ({kind}, {shown(record.device)})"]
    if record.failure is not None:
        head.append(f"FAILED ({record.failure.kind}): {shown(record.failure.message)}")
    head.append(analysis.bottleneck.statement if analysis.bottleneck else "Nothing was recorded.")
    stages = _stages(analysis, cached=record.cached)
    parts = ["\n".join(head), _owners(analysis), _components(analysis), stages, _moments(analysis.moments)]
    parts += [_loading(analysis), _switches(analysis.switches), _growth(analysis)]
    return _joined([*parts, _advice(record, advice), _notes(record.notes)])


def _owners(analysis: Analysis) -> str:
    if not analysis.peaks:
        return ""
    peak = analysis.peaks[0]
    kinds = {
        "alive at the peak, by component": peak.by_component,
        "by stage": peak.by_stage,
        "by module": peak.by_module,
        "by shape": peak.by_shape,
    }
    parts = []
    for title, owners in kinds.items():
        rows = ([_short(o.name), f"{o.count:,}", mib_cell(o.bytes), _share(o.share)] for o in owners)
        parts.append(table([[title, "count", "MiB", "share"], *rows]))
    return "\n\n".join([*parts, *([peak.unusable.reason] if peak.unusable else [])])


def _components(analysis: Analysis) -> str:
    rows = []
    for c in analysis.components:
        sizes = (c.base_bytes, c.host_bytes, c.activation_bytes, c.streamed_bytes)
        rows.append([c.name, *map(mib_cell, sizes), _share(c.hidden_share)])
    return listed(["component", "base MiB", "host MiB", "activation MiB", "streamed MiB", "hidden"], rows)


def _stages(analysis: Analysis, *, cached: bool) -> str:
    """cached: the allocator keeps what is freed. The CPU's does not, so that there is no fragmentation to speak of."""
    if not analysis.stages:
        return ""
    sizes = ["start MiB", "peak MiB", "activation MiB", "fluctuation MiB"]
    rows = [["stage", *sizes, *(["fragmentation", "highest"] if cached else []), "time", "share"]]
    for s in analysis.stages:
        figures = (s.start.allocated_bytes, s.peak.allocated_bytes, s.activation_bytes, s.fluctuation_bytes)
        shares = (s.fragmentation.at_peak, s.fragmentation.highest) if cached else ()
        cells = [*map(mib_cell, figures), *map(_share, shares)]
        rows.append([s.name, *cells, seconds_cell(s.seconds), _share(s.time_share)])
    if not cached:
        return table(rows)
    total = f"Fragmentation: {_share(analysis.fragmentation_at_peak)} at the peak, at most {_share(analysis.fragmentation_highest)}."
    return f"{table(rows)}\n{total}"


def _moments(moments: SpecMoments) -> str:
    inside = f"inside the transformer ({moments.highest_block})" if moments.highest_block else "inside the transformer"
    places = (
        ("before the first forward pass", moments.before_forward),
        (inside, moments.inside_blocks),
        ("after vae.decode", moments.after_decode),
    )
    rows = ([name, *map(mib_cell, astuple(memory))] for name, memory in places if memory is not None)
    return listed(["moment", "allocated MiB", "reserved MiB", "device MiB"], rows)


def _loading(analysis: Analysis) -> str:
    rows = (
        [load.component or "-", mib_cell(load.added_bytes), mib_cell(load.transient_bytes), seconds_cell(load.seconds)]
        for load in analysis.loading
    )
    return listed(["loading", "added MiB", "beyond that, while loading MiB", "time"], rows)


def _switches(switches: Sequence[Switch]) -> str:
    rows = []
    for s in switches:
        given_back = (s.given_back_allocated_bytes, s.given_back_reserved_bytes)
        sizes = (s.before.allocated_bytes, s.after.allocated_bytes, *given_back)
        rows.append([f"{s.leaving or '-'} to {s.entering or '-'}", *map(mib_cell, sizes)])
    return listed(["switching", "before MiB", "after MiB", "given back MiB", "reserved given back MiB"], rows)


def _growth(analysis: Analysis) -> str:
    lines = []
    for growth in analysis.growth:
        steps, stage = len(growth.allocated_bytes), shown(growth.stage)
        if growth.leak:
            lines.append(f"LEAK in {stage}: {mib(growth.bytes_per_step)} more after every one of {steps} steps.")
        elif growth.leak is None and growth.steps > steps:
            few = f"{steps} of {growth.steps:,} steps were simulated, and the others repeat one of them"
            lines.append(f"Growth in {stage}: cannot be told, since only {few}.")
        elif growth.leak is None:
            lines.append(f"Growth in {stage}: {steps} steps are too few to tell.")
        else:
            lines.append(f"Growth in {stage}: none over {steps} steps.")
    return "\n".join(lines)


def _advice(record: RunRecord, advice: Sequence[Advice]) -> str:
    """Lossless changes first. What is left and whether that fits in columns of their own where they are known."""
    if not advice:
        return ""
    advice = advice_first(advice)
    columns = {"what lowers the peak most (simulated)": [item.label for item in advice]}
    columns["saves MiB"] = [mib_cell(item.saved_bytes) for item in advice]
    if any(item.peak_device_bytes is not None for item in advice):
        columns["leaves MiB"] = [mib_cell(item.peak_device_bytes) for item in advice]
    columns["costs"] = [seconds_cell(item.seconds) for item in advice]
    if any(item.fits is not None for item in advice):
        columns["then fits"] = [{True: "yes", False: "no", None: "-"}[item.fits] for item in advice]
    text = table([list(columns), *map(list, zip(*columns.values(), strict=True))])
    base = unlimited_base(record, advice[0])
    return text if base is None else f"{text}\n{Texts()('advice_base', base=human(base))}"


# --- events --------------------------------------------------------------------------------------------------------------


def events_text(summary: EventSummary) -> str:
    peak = summary.peak
    head = f"{summary.events:,} events, recorded within {seconds(summary.seconds)}."
    if peak is not None:
        head += f" Highest allocated: {mib(peak.allocated_bytes or 0)} at '{_short(peak.name)}'."
    rows = []
    for g in summary.groups:
        sizes = (g.allocated_bytes, g.reserved_bytes, g.device_bytes, g.incremental_bytes)
        rows.append([_short(g.name), f"{g.count:,}", *map(mib_cell, sizes)])
    events = listed(["event", "count", "allocated MiB", "reserved MiB", "device MiB", "increment MiB"], rows)
    growth = ([f"{_short(g.after)} -> {_short(g.before)}", mib_cell(g.bytes)] for g in summary.growth)
    return _joined([head, events, listed(["largest growth", "MiB"], growth), _notes(summary.notes)])


# --- a torch.profiler trace ----------------------------------------------------------------------------------------------


def trace_text(trace: TraceSummary) -> str:
    """Memory first, then operators by memory and time, kernels, steps."""
    rank = "" if trace.rank is None else f" of rank {trace.rank}"
    rank += f" of {trace.world_size}" if rank and trace.world_size is not None else ""
    head = f"{shown(trace.path.name)}: {trace.events:,} events{rank} in {seconds(trace.seconds)}."
    main = f" ({trace.memory[0].device})" if len(trace.memory) > 1 else ""
    parts = [head, "\n".join(map(_curve, trace.memory))]
    parts.append(_operators(f"operators by memory allocated{main}", trace.operators_by_memory))
    parts.append(_operators("operators by own time", trace.operators_by_time))
    kernels = ([_short(k.name), f"{k.calls:,}", seconds_cell(k.seconds)] for k in trace.kernels[:ROWS])
    parts.append(listed(["kernels and copies", "calls", "time"], kernels))
    parts.append(_spans(f"steps{main}", trace.steps))
    parts.append(_spans(f"marked with record_function{main}", trace.annotations))
    return _joined([*parts, _notes(trace.notes)])


def _curve(curve: MemoryCurve) -> str:
    """What was reserved and its fragmentation only where the trace knows them."""
    text = f"{curve.device}: peak {mib(curve.peak_allocated_bytes)} allocated at {curve.peak_seconds:.3f} s"
    if curve.peak_reserved_bytes is not None:
        text += (
            f", with {mib(curve.reserved_at_peak_bytes or 0)} reserved; peak reserved {mib(curve.peak_reserved_bytes)}; "
            f"fragmentation {_share(curve.fragmentation_at_peak)} at the peak, {_share(curve.fragmentation_mean)} on "
            f"average, {_share(curve.fragmentation_max)} at most"
        )
    return f"{text}; fluctuation {mib(curve.fluctuation_bytes)}."


def _operators(title: str, operators: Sequence[Operator]) -> str:
    rows = []
    for o in operators[:ROWS]:
        times = map(seconds_cell, (o.self_seconds, o.seconds))
        rows.append([_short(o.name), f"{o.calls:,}", mib_cell(o.allocated_bytes), *times])
    return listed([title, "calls", "allocated MiB", "own time", "time"], rows)


def _spans(title: str, spans: Sequence[TraceSpan]) -> str:
    reserved = any(span.peak_reserved_bytes is not None for span in spans)
    rows = [[title, "start", "time", "peak allocated MiB", *(["peak reserved MiB"] if reserved else [])]]
    for span in spans[:ROWS]:
        times = [f"{span.start:.3f} s", seconds_cell(span.end - span.start)]
        held = [mib_cell(span.peak_reserved_bytes)] if reserved else []
        rows.append([_short(span.name), *times, mib_cell(span.peak_allocated_bytes), *held])
    more = f"\n... and {len(spans) - ROWS:,} more" if len(spans) > ROWS else ""
    return table(rows) + more if len(rows) > 1 else ""


# --- an allocator snapshot -----------------------------------------------------------------------------------------------


def snapshot_text(snapshot: Snapshot) -> str:
    """The device with the highest peak in full, the others in a line each; places of allocation whatever the blocks' sizes."""
    main = snapshot.main
    lines = [_history(history) for history in sorted(snapshot.devices, key=lambda h: h is not main)]
    if snapshot.host is not None:
        lines.append(_host(snapshot.host))
    when = "at the peak" if main.recorded else "when it was taken"
    gpu = f" of GPU {main.device}" if len(snapshot.devices) > 1 else ""
    total = max(1, main.peak.allocated_bytes)
    places = main.by_place()
    rows = ([_short(p.name), f"{p.count:,}", mib_cell(p.bytes), _share(p.bytes / total)] for p in places[:ROWS])
    alive = listed([f"alive {when}{gpu}, by where it was allocated", "count", "MiB", "share"], rows)
    more = f"\n... and {len(places) - ROWS:,} more places" if len(places) > ROWS else ""
    reasons: Counter[str] = Counter()
    for hole in main.peak.holes:
        reasons[hole.reason] += hole.bytes
    unused = ([why, mib_cell(size)] for why, size in reasons.most_common(ROWS))
    holes = listed([f"reserved but not in use {when}{gpu}", "MiB"], unused)
    refused = [
        f"out of memory at {r.seconds:.3f} s: {mib(r.requested_bytes)} asked for, the driver had {mib(r.free_bytes)} free"
        for r in main.out_of_memory[:ROWS]
    ]
    return _joined(["\n".join(lines), "\n".join(refused), alive + more, holes, _notes(snapshot.notes)])


def _history(history: DeviceHistory) -> str:
    peak = history.peak
    unused = peak.reserved_bytes - peak.allocated_bytes
    if not history.recorded:
        return (
            f"GPU {history.device}: no history was recorded, so this is the state when the snapshot was taken, not a peak: "
            f"{mib(peak.allocated_bytes)} allocated ({peak.allocated_bytes:,} bytes), {mib(peak.reserved_bytes)} reserved "
            f"({mib(unused)} not in use). For a peak, call torch.cuda.memory._record_memory_history() before the first "
            "allocation."
        )
    at = f"at {peak.seconds:.3f} s"
    if unused >= 0:  # less is reserved than allocated where the events that reserved it are not in the file
        at += f", {mib(peak.reserved_bytes)} reserved there ({mib(unused)} not in use); peak reserved "
        at += mib(history.peak_reserved_bytes)
    text = (
        f"GPU {history.device}: peak {mib(peak.allocated_bytes)} allocated ({peak.allocated_bytes:,} bytes) {at}; at the end "
        f"{mib(history.allocated_bytes)} allocated, {mib(history.reserved_bytes)} reserved; {history.events:,} events."
    )
    return text if history.complete else text + " Its history is incomplete."


def _host(host: HostMemory) -> str:
    return (
        f"pinned host memory: {mib(host.peak_reserved_bytes)} held at most; at the end {mib(host.reserved_bytes)}, "
        f"{mib(host.allocated_bytes)} of it in use."
    )

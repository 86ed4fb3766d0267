"""Several runs side by side as plain text. No torch."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanvram.analysis.compare import Comparison, Key, PredictionError, Violation, working_seconds
from wanvram.analysis.snapshot import read_snapshot, snapshot_timeline
from wanvram.foreign_text import shown
from wanvram.input_files import DAMAGED_GZIP, state_of, unpacked
from wanvram.record import WHOLE_RUN, RunRecord
from wanvram.report.runs import Run, asked, find_runs
from wanvram.report.terminal import listed, table
from wanvram.report.timeline import coarse_timeline
from wanvram.report.translations import Texts
from wanvram.spans import Memory, Span
from wanvram.units import MIB, mib_cell, seconds_cell

__all__ = ["comparison_text", "read_runs", "runs_table", "violations_text"]

MAX_CELL = 40
OTHERS = 4  # runs beside A in one table: about 140 columns
SEED = "request.base_seed"  # drawn anew for each run, and no figure depends on it: shown only if nothing else differs
_STAGE_FIGURES = (
    ("stages", "peak_allocated_bytes", "peak allocated MiB"),
    ("stages", "activation_bytes", "activation MiB"),
    ("stages", "peak_reserved_bytes", "peak reserved MiB"),
    ("stages", "peak_device_bytes", "peak device MiB"),
    ("stages", "seconds", "time s"),
    ("components", "base_bytes", "base MiB"),
    ("components", "activation_bytes", "activation MiB"),
    ("components", "host_bytes", "host MiB"),
    ("ranks", "peak_allocated_bytes", "peak allocated MiB"),
    ("ranks", "peak_device_bytes", "peak device MiB"),
    ("ranks", "seconds", "time s"),
)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Run directories, directories of them, record files of any name, and PyTorch's snapshots. Raises InputError."""
    runs: list[Run] = []
    taken: set[str] = set()
    for path in paths:
        state = state_of(path)
        found = [_read_file(path)] if state and not stat.S_ISDIR(state.st_mode) else find_runs([path])
        for run in found:
            label, number = run.label, 2
            while label in taken:
                label, number = f"{run.label} ({number})", number + 1
            taken.add(label)
            runs.append(replace(run, label=label))
    return runs


def _read_file(path: Path) -> Run:
    if _is_pickle(path):
        return _read_snapshot(path)
    record = RunRecord.read(path)
    return Run(str(record.config.get("name") or path.stem), record, coarse_timeline(record), False)


def _is_pickle(path: Path) -> bool:
    """By content: what a pickle of protocol 2 or later begins with."""
    with unpacked(path) as file, suppress(*DAMAGED_GZIP):
        return file.read(1) == b"\x80"
    return False


def _read_snapshot(path: Path) -> Run:
    """PyTorch's own record of a process as a measured run of one stage."""
    snapshot = read_snapshot(path)
    main = snapshot.main
    peak = Memory(main.peak_allocated_bytes, main.peak_reserved_bytes, None)
    end = Memory(main.allocated_bytes, main.reserved_bytes, None)
    unrecorded = [] if main.complete else ["it was not recorded from the start: the peak may have been higher"]
    record = RunRecord(
        device=f"cuda:{main.device}",
        simulated=False,
        config={"name": path.name, "description": f"snapshot {path.name}", "foreign": True},
        stages=[Span(WHOLE_RUN, "stage", None, Memory(0, 0, None), peak.highest(end), end)],
        notes=[*snapshot.notes, *unrecorded],
    )
    return Run(path.name, record, snapshot_timeline(snapshot), True)


def runs_table(
    runs: Sequence[tuple[str, RunRecord]], places: Sequence[int | None] | None = None, texts: Texts | None = None
) -> str:
    """One line per run: what came out, the peak and where, the time of a step and of all without loading.

    places: each run's rank among those that were asked the same, in a column of its own.
    """
    texts = texts or Texts()
    cached = any(record.cached for _, record in runs)
    figures = ["allocated", *(["reserved"] if cached else []), "device"]
    keys = ["configured", "result", *(f"{figure}_mib" for figure in figures), "peak_in", "step", "time"]
    rows = [[texts(key) for key in keys]]
    for name, record in runs:
        peak, where = record.peak(), record.peak_span()
        cells = ["-" if peak is None else mib_cell(getattr(peak, f"{figure}_bytes")) for figure in figures]
        if cached and not record.cached:
            cells[1] = "-"
        times = map(seconds_cell, (record.step_seconds(), working_seconds(record)))
        rows.append([name, _result(record, texts), *cells, where.name if where else "-", *times])
    if places is not None:
        ranked = [texts("rank"), *("-" if place is None else str(place) for place in places)]
        rows = [[row[0], rank, *row[1:]] for row, rank in zip(rows, ranked, strict=True)]
    failures = [f"{shown(name)}: {shown(r.failure.message)}" for name, r in runs if r.failure is not None]
    return "\n".join([table(rows), *(["", *failures] if failures else [])])


def _result(record: RunRecord, texts: Texts) -> str:
    kind = texts("predicted" if record.simulated else "measured")
    if record.failure is not None:
        return texts("out_of_memory" if record.failure.kind == "oom" else "did_fail")
    return kind if record.fits is None else texts("and_fits" if record.fits else "and_exceeds", kind=kind)


def comparison_text(comparison: Comparison) -> str:
    """Runs are called A, B, C, ...; every difference counts from A. Figures equal in all runs are left out.

    A table has at most five runs, which is as much as a wide terminal shows; the others follow in tables of their own.
    """
    last = len(comparison.labels)
    same = "The configurations are the same." if last > 1 and not comparison.changed else ""
    unlike = Texts()("unlike_compared") if len(set(map(asked, comparison.records))) > 1 else ""
    parts = [_legend(comparison), same, unlike]
    for first in range(1, max(last, 2), OTHERS):
        others = range(first, min(first + OTHERS, last))
        parts += [_configuration(comparison, others), _peaks(comparison, others)]
        for group, figure, title in _STAGE_FIGURES:
            keys = {name: (group, name, figure) for name in comparison.names(group)}
            parts.append(_differences(comparison, f"{group.removesuffix('s')}, {title}", keys, others))
    parts += [_prediction(*pair) for pair in comparison.predictions]
    return "\n\n".join(part for part in parts if part) + "\n"


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"R{index + 1}"


def _legend(comparison: Comparison) -> str:
    lines = []
    for index, (label, record) in enumerate(zip(comparison.labels, comparison.records, strict=True)):
        kind = "predicted" if record.simulated else "measured"
        failed = f", FAILED ({record.failure.kind}): {shown(record.failure.message)}" if record.failure else ""
        lines.append(f"{_letter(index)}: {shown(label)} ({kind}, {shown(record.device)}){failed}")
    return "\n".join(lines)


def _configuration(comparison: Comparison, others: Sequence[int]) -> str:
    """What differs between A and any of the others."""
    shown = [0, *others]
    changed = {key: [values[run] for run in shown] for key, values in comparison.changed.items()}
    changed = {key: values for key, values in changed.items() if any(value != values[0] for value in values)}
    if changed.keys() - {SEED, "name", "description"}:
        changed.pop(SEED, None)
    return listed(["changed", *map(_letter, shown)], ([key, *map(_cell, row)] for key, row in changed.items()))


def _cell(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shown(" ".join(text[: 2 * MAX_CELL].split()), MAX_CELL)


def _peaks(comparison: Comparison, others: Sequence[int]) -> str:
    keys = {name: ("peak", f"{name}_bytes") for name in ("allocated", "reserved", "device")}
    return _differences(comparison, "peak, MiB", keys, others, always=True)


def _differences(
    comparison: Comparison, title: str, keys: Mapping[str, Key], others: Sequence[int], *, always: bool = False
) -> str:
    """A row per key: A's figure, then for each other run its figure, the difference, and that in per cent of A.

    always: also where all are equal. What is reserved means nothing where no run has a cache.
    """
    head = [title, "A"]
    for run in others:
        head += [_letter(run), f"{_letter(run)}-A", "%"]
    cached = any(record.cached for record in comparison.records)
    rows = []
    for name, key in keys.items():
        values = comparison.figures.get(key, ()) if cached or "reserved" not in key[-1] else ()
        if values and (always or any(values[run] != values[0] for run in others)):
            rows.append([name, *_cells(comparison, key, others)])
    return listed(head, rows)


def _cells(comparison: Comparison, key: Key, others: Sequence[int]) -> Iterator[str]:
    values = comparison.figures[key]
    first = values[0]
    yield _figure(key, first)
    for run in others:
        difference = comparison.difference(key, run)
        yield _figure(key, values[run])
        yield _figure(key, difference, "+")
        yield f"{100 * difference / first:+.1f}" if difference is not None and first else "-"


def _figure(key: Key, value: int | float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return format(value, f"{sign},.2f") if key[-1] == "seconds" else format(value / MIB, f"{sign},.1f")


def _prediction(predicted: int, measured: int, errors: Sequence[PredictionError]) -> str:
    title = f"{_letter(predicted)} predicted, {_letter(measured)} measured"
    rows = [[title, "predicted", "measured", "error %"]]
    for error in errors:
        figures = [_figure(error.key, value) for value in (error.predicted, error.measured)]
        share = "-" if error.error is None else f"{100 * error.error:+.2f}"
        rows.append([" ".join(error.key), *figures, share])
    return table(rows) + "\nBytes in MiB, time in seconds; + is predicted too high."


def violations_text(violations: Sequence[Violation]) -> str:
    """One line per condition that a run meets."""
    return "".join(f"FAIL {shown(v.label)}: {shown(v.condition)}: {shown(v.text)}\n" for v in violations)

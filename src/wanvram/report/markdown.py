"""The Markdown report: the same answers and tables in a stable order, one fact per line, so that a diff shows what changed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from wanvram.foreign_text import MAX_SHOWN, shown
from wanvram.record import RunRecord
from wanvram.report.findings import advice_first, alike, answer, card_of, ranked, ranks, together, unlimited_base
from wanvram.report.gpus import GPU_HEADS, gpu_cells
from wanvram.report.runs import Run, asked, pairs
from wanvram.report.terminal import component_cells, videos_line
from wanvram.report.timeline import peak_moment
from wanvram.report.translations import Texts, shortened
from wanvram.spans import Memory, Span
from wanvram.timeline_record import OTHER, AliveBlocks, TimelineMoment
from wanvram.units import MIB, human, mib_cell, seconds

__all__ = ["markdown_report"]

ALIVE_ROWS = 10
MAX_TEXT = 300
MAX_SENTENCE = 4 * MAX_SHOWN  # of ours; each name in it has at most MAX_SHOWN


def markdown_report(runs: Sequence[Run], language: str = "en") -> str:
    """The whole document. Nothing in it depends on where or when it was made."""
    texts = Texts(language)
    lines = [f"# {texts('title')}", ""]
    if len(runs) > 1:
        lines += [_text(together(runs, texts), MAX_SENTENCE), "", f"## {texts('runs')}", "", *_tables(runs, texts)]
    for predicted, measured in pairs(runs):
        lines += _accuracy(runs[predicted], runs[measured], texts)
    for run in runs:
        lines += _run(run, texts)
    return "\n".join(lines).rstrip() + "\n"


def _tables(runs: Sequence[Run], texts: Texts) -> list[str]:
    """A table of runs for each thing that was asked for."""
    groups = alike(runs)
    if len(groups) == 1:
        return [*_runs(runs, texts), ""]
    lines = []
    for group in groups:
        task, size, frames = asked(group[0].record)
        title = _text(texts("asked", task=task, size=size, frames=frames))
        lines += _section(title, [_text(ranked(group, texts), MAX_SENTENCE), "", *_runs(group, texts)])
    return lines


def _runs(runs: Sequence[Run], texts: Texts) -> list[str]:
    cached = any(run.record.cached for run in runs)
    heads = ["rank", "run", "kind", *_peaks(cached), "step", "stage", *(["card"] if cached else []), "verdict"]
    rows = []
    measured = {predicted: runs[index].label for predicted, index in pairs(runs)}
    for index, (run, place) in enumerate(zip(runs, ranks(runs), strict=True)):
        peak, where, step = run.record.peak(), run.record.peak_span(), run.record.step_seconds()
        rows.append(
            [
                None if place is None else str(place),
                run.label,
                _kind(run, measured.get(index), texts),
                *_figures(peak, cached),
                None if step is None else seconds(step),
                where.name if where else None,
                *([_card(run.record, texts)] if cached else []),
                _verdict(run.record, texts),
            ]
        )
    return _table([_head(key, texts) for key in heads], rows, numbers=(0, *range(3, heads.index("stage"))))


def _peaks(cached: bool) -> list[str]:
    return ["peak_device", *(["peak_reserved"] if cached else []), "peak_allocated"]


def _figures(memory: Memory | None, cached: bool) -> list[str | None]:
    """device, reserved where that means something, allocated in MiB."""
    if memory is None:
        return [None] * len(_peaks(cached))
    figures = [memory.device_bytes, *([memory.reserved_bytes] if cached else []), memory.allocated_bytes]
    return [None if figure is None else mib_cell(figure) for figure in figures]


def _kind(run: Run, measured: str | None, texts: Texts) -> str:
    """measured: the run whose prediction this is."""
    if measured is not None:
        return texts("prediction_of", run=measured)
    return texts("predicted" if run.record.simulated else "measured")


def _card(record: RunRecord, texts: Texts) -> str | None:
    if record.peak() is None or record.device == "cpu":
        return None
    if record.failure is not None:
        return "-"
    card = card_of(record)
    return f"{card} GB" if card else texts("over_cards", card=80)


def _verdict(record: RunRecord, texts: Texts) -> str | None:
    if record.failure is not None:
        return texts("failed")
    return None if record.fits is None else texts("fits" if record.fits else "does_not_fit")


def _run(run: Run, texts: Texts) -> list[str]:
    said = answer(run, texts)
    kind = texts("simulated" if run.record.simulated else "measured_on")
    lines = [f"## {_text(run.label)}", "", f"{kind} ({_text(run.record.device)})", ""]
    for sentence in filter(None, (said.headline, said.owner, said.change)):
        lines += [_text(sentence, MAX_SENTENCE), ""]
    if len(run.record.video_seconds()) > 1:  # the times of a single one are those of its stages
        lines += _section(texts("video_times"), _videos(run.record, texts))
    heads = [_head(key, texts) for key in ("component", "parameters", "base", "host", "activation")]
    lines += _section(texts("components"), _table(heads, component_cells(run.record), numbers=range(1, 5)))
    lines += _section(texts("stages"), _stages(run, texts))
    if run.record.ranks:
        heads = [texts(key) for key in GPU_HEADS]
        lines += _section(texts("every_gpu"), _table(heads, gpu_cells(run.record), range(1, len(heads) - 1)))
    moment = peak_moment(run.timeline)
    if moment is not None and run.borrowed:
        lines += [texts("borrowed"), ""]
    if moment is not None:
        lines += _section(f"{texts('alive')}: {texts('moment_peak')}", _alive(moment, texts))
    if run.advice:
        lines += _section(texts("advice_title"), _advice(run, texts))
    settings = sorted(run.settings().items())
    listed = [f"- `{_code(key)}`: {_text(shortened(value, MAX_TEXT))}" for key, value in settings]
    lines += _section(texts("configuration"), listed)
    if run.record.notes:
        lines += _section(texts("notes"), [f"- {_text(shortened(note, MAX_TEXT))}" for note in run.record.notes])
    return lines


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return [f"### {title}", "", *lines, ""]


def _videos(record: RunRecord, texts: Texts) -> list[str]:
    times = enumerate(record.video_seconds(), 1)
    rows = [[str(number), None if time is None else seconds(time)] for number, time in times]
    lines = [line for sentence in videos_line(record, texts) for line in (_text(sentence), "")]
    return [*lines, *_table([texts("video"), texts("own_time")], rows, numbers=(0, 1))]


def _stages(run: Run, texts: Texts) -> list[str]:
    cached = run.record.cached
    fragmentation = ["fragmentation"] if cached else []
    heads = ["stage", "component", "start", "activation", *_peaks(cached), *fragmentation, "time"]
    rows = [_stage(span, cached) for span in run.record.stages]
    return _table([_head(key, texts) for key in heads], rows, numbers=range(2, len(heads)))


def _stage(span: Span, cached: bool) -> list[str | None]:
    time = seconds(span.seconds) if span.seconds is not None else None
    start = mib_cell(span.start.allocated_bytes)
    activation = None if span.kind == "load" else mib_cell(span.activation_bytes)
    fragmentation = [f"{span.peak.fragmentation:.1%}"] if cached else []
    return [span.name, span.component, start, activation, *_figures(span.peak, cached), *fragmentation, time]


def _alive(moment: TimelineMoment, texts: Texts) -> list[str]:
    groups = _groups(moment)
    rows = [
        [
            mib_cell(g.bytes),
            str(g.count),
            g.component,
            texts("other") if g.operation == OTHER else g.operation,
            None if g.shape is None else "x".join(map(str, g.shape)),
            g.dtype,
            g.module,
        ]
        for g in groups[:ALIVE_ROWS]
    ]
    rest = groups[ALIVE_ROWS:]
    if rest:
        count = sum(g.count for g in rest)
        rows.append([mib_cell(sum(g.bytes for g in rest)), str(count), None, texts("other"), None, None, None])
    heads = [_head("bytes", texts)]
    heads += [texts(key) for key in ("count", "component", "operation", "shape", "dtype", "module")]
    return _table(heads, rows, numbers=(0, 1))


def _groups(moment: TimelineMoment) -> list[AliveBlocks]:
    """Largest first. Without line numbers of the code, which any edit of it moves: groups that only these told apart are one."""
    sums: dict[AliveBlocks, AliveBlocks] = {}
    for group in moment.alive:
        key = replace(group, module=group.place, stage=None, bytes=0, count=0)
        total = sums.get(key, key)
        sums[key] = replace(total, bytes=total.bytes + group.bytes, count=total.count + group.count)
    return sorted(sums.values(), key=lambda g: (-g.bytes, json.dumps(vars(g), sort_keys=True)))


def _advice(run: Run, texts: Texts) -> list[str]:
    """What is left and whether that fits in columns of their own where they are known."""
    advice = advice_first(run.advice)
    base = unlimited_base(run.record, advice[0])
    intro = [] if base is None else [texts("advice_base", base=human(base)), ""]
    columns = {"advice_change": [a.label for a in advice], "advice_saved": [mib_cell(a.saved_bytes) for a in advice]}
    if any(a.peak_device_bytes is not None for a in advice):
        columns["advice_left"] = [mib_cell(a.peak_device_bytes) for a in advice]
    numbers = range(1, len(columns) + 1)
    columns["advice_seconds"] = ["" if a.seconds is None else seconds(a.seconds) for a in advice]
    if any(a.fits is not None for a in advice):
        columns["fits"] = ["" if a.fits is None else texts("yes" if a.fits else "no") for a in advice]
    return [*intro, *_table([_head(key, texts) for key in columns], zip(*columns.values(), strict=True), numbers)]


def _accuracy(predicted: Run, measured: Run, texts: Texts) -> list[str]:
    """Peaks of the whole run and of every stage that both have, with signed errors."""
    rows: list[list[str | None]] = []
    for name, p, m in _same(predicted, measured, texts):
        for key in ("device", "reserved", "allocated"):
            a, b = getattr(p, f"{key}_bytes"), getattr(m, f"{key}_bytes")
            if a is not None and b is not None:
                figures = [mib_cell(a), mib_cell(b), f"{(a - b) / MIB:+,.1f}", f"{(a - b) / b:+.2%}" if b else None]
                rows.append([f"{name}: {texts(f'peak_{key}')}", *figures])
    heads = [texts("figure"), *(_head(key, texts) for key in ("predicted", "measured", "error")), texts("relative")]
    title = f"## {texts('accuracy')}: {_text(predicted.label)}, {_text(measured.label)}"
    return [title, "", texts("accuracy_help"), "", *_table(heads, rows, numbers=range(1, 5)), ""]


def _same(a: Run, b: Run, texts: Texts) -> Iterable[tuple[str, Memory, Memory]]:
    whole = a.record.peak(), b.record.peak()
    if whole[0] is not None and whole[1] is not None:
        yield texts("whole"), whole[0], whole[1]
    others = {span.name: span for span in b.record.stages}
    for span in a.record.stages:
        if span.name in others:
            yield span.name, span.peak, others[span.name].peak


_IN_MIB = {"peak_device", "peak_reserved", "peak_allocated", "base", "host", "activation", "start", "bytes"}
_IN_MIB |= {"advice_saved", "advice_left", "predicted", "measured", "error"}


def _head(key: str, texts: Texts) -> str:
    return f"{texts(key)} MiB" if key in _IN_MIB else texts(key)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str | None]], numbers: Iterable[int]) -> list[str]:
    """No padding: a longer number must not change the other lines."""
    right = set(numbers)
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    return [_line(heads), _line(rule, plain=True), *(_line(row) for row in rows)]


def _line(cells: Sequence[str | None], *, plain: bool = False) -> str:
    return "| " + " | ".join("" if cell is None else cell if plain else _text(cell) for cell in cells) + " |"


_SIGNS = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]|~#"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})
_INSIDE_WORD = re.compile(r"(?<=[^\W_])\\_(?=[^\W_])")


def _text(text: str, limit: int = MAX_SHOWN) -> str:
    """Nothing in it is read as Markdown or HTML. Underscores inside words stay: they mean nothing there."""
    return _INSIDE_WORD.sub("_", shown(text, limit).translate(_SIGNS))


def _code(text: str) -> str:
    """Within a code span: nothing ends it, neither its sign nor the end of a paragraph."""
    return shown(text).replace("`", "'").strip() or "-"

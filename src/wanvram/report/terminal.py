"""The terminal summary of one run: peak first, then components, stages and the three largest moments. No torch.

Text is made plain, then shown: on a terminal with the same words in bold and colour.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TextIO

from wanvram.command_line import MAX_COMMAND, plan_command
from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.record import AttentionChoice, RunRecord
from wanvram.report.gpus import GPU_HEADS, gpu_cells, sharing_lines
from wanvram.report.runs import asked
from wanvram.report.translations import Texts
from wanvram.simulate.gpus import card_of_run
from wanvram.spans import Span
from wanvram.units import MIB, human, mib_cell, seconds, seconds_cell

__all__ = ["attention_line", "component_cells", "listed", "show", "summarize", "table", "videos_line"]

_BAD = r"\b(DOES NOT FIT|does not fit|FAILED|[Oo]ut of memory)\b|放不下|失败|显存不足"
_GOOD = r"(?<!whether it )\bfits\b|(?<!可询问能否)可容纳"


def summarize(record: RunRecord, texts: Texts | None = None) -> str:
    """Multi-line text; exact for a given record. In English unless told otherwise."""
    texts = texts or Texts()
    parts = [_headline(record, texts), "", _components(record, texts), "", _stages(record, texts), ""]
    if record.ranks:
        parts += [table([[texts(key) for key in GPU_HEADS], *gpu_cells(record)]), ""]
    parts.append(_largest_moments(record, texts))
    if record.failure is not None and record.failure.alive:
        parts += ["", texts("alive_failed"), *_alive(record.failure.alive)]
    if record.failure is not None and record.failure.kind == "oom":
        parts += ["", _remedy(record, texts)]
    if record.notes:
        parts += ["", *(texts("note", note=note) for note in record.notes)]
    return "\n".join(parts) + "\n"


def _headline(record: RunRecord, texts: Texts) -> str:
    task, size, frames = asked(record)
    name = str(record.config.get("name") or "run")
    if record.foreign:
        lines = [f"{name}: {record.config.get('description') or '-'}"]
    else:
        lines = [texts("asked_run", name=name, task=task, size=size, frames=frames)]
    lines.append(texts("is_simulated" if record.simulated else "is_measured", device=record.device))
    lines += sharing_lines(record, texts)
    where = record.peak_span()
    if where is not None:
        figures = texts.listed(list(_peak_figures(record, where, texts)))
        lines += [texts("peak_line", figures=figures, stage=where.name), f"      {_why(where, texts)}"]
    if record.attention is not None:
        lines.append(attention_line(record.attention, texts))
    if record.simulated and record.times.in_all_seconds is not None and record.failure is None:
        lines.append(texts("in_all", time=seconds(record.times.in_all_seconds)))
    lines += videos_line(record, texts)
    lines.append(_verdict(record, texts))
    return "\n".join(lines)


def _peak_figures(record: RunRecord, where: Span, texts: Texts) -> Iterator[str]:
    """The highest of each figure over the whole run, as in its record; one that another stage than `where` reaches says which."""
    for name in ("allocated", *(["reserved"] if record.cached else []), "device"):
        key = f"{name}_bytes"
        highest = max(record.all_stages(), key=lambda span: getattr(span.peak, key) or 0)
        figure, own = getattr(highest.peak, key), getattr(where.peak, key)
        if figure is not None:
            other = "" if figure == own else " " + texts("peak_elsewhere", stage=highest.name)
            yield f"{texts(name)} {human(figure)}{other}"


def attention_line(attention: AttentionChoice, texts: Texts) -> str:
    """What computes the transformer's attention, and why that."""
    own, cross = attention.self_attention.backend, attention.cross_attention.backend
    key = "attention_one" if own == cross else "attention_line"
    return texts(key, own=own, cross=cross, basis=texts(f"attention_{attention.basis}"))


def videos_line(record: RunRecord, texts: Texts) -> list[str]:
    """Of several videos what one takes; nothing of a single one, or where times are unknown."""
    count, each, whole = len(record.video_seconds()), record.seconds_each(), record.times.in_all_seconds
    if count < 2 or each is None or whole is None:
        return []
    return [texts("videos", count=count, together=record.together, each=seconds(each), time=seconds(whole))]


def _why(peak: Span, texts: Texts) -> str:
    start = peak.start.allocated_bytes
    activation = peak.peak.allocated_bytes - start
    if peak.kind == "load":
        key = "why_libraries" if peak.component is None else "why_load"
    else:
        key = "why_activation" if activation > start else "why_weights"
    return texts(key, start=human(start), activation=human(activation))


def _verdict(record: RunRecord, texts: Texts) -> str:
    failure = record.failure
    if failure is not None:
        key = "verdict_failed_in" if failure.stage else "verdict_failed"
        return texts(key, stage=failure.stage, kind=failure.kind, message=failure.message)
    if record.budget_bytes is not None:
        return texts("verdict_fits" if record.fits else "verdict_exceeds", budget=human(record.budget_bytes))
    return texts("verdict_none")


def _components(record: RunRecord, texts: Texts) -> str:
    heads = [texts(key) for key in ("component", "parameters", "base_mib", "host_mib", "activation_mib")]
    return table([heads, *component_cells(record)])


def component_cells(record: RunRecord) -> Iterator[list[str]]:
    """Of each its name, parameters, and the MiB of weights on the device, of weights on the host and of activations."""
    for c in record.components:
        sizes = (c.base_bytes, c.host_bytes, c.activation_bytes)
        yield [c.name, f"{c.parameters:,}", *map(mib_cell, sizes)]


def _stages(record: RunRecord, texts: Texts) -> str:
    reserved = ["reserved_mib"] if record.cached else []
    heads = ("stage", "start_mib", "peak_mib", "activation_mib", *reserved, "device_mib", "time")
    rows = [[texts(key) for key in heads]]
    for span in record.stages:
        m = span.peak
        activation = "-" if span.kind == "load" else mib_cell(span.activation_bytes)  # what loading adds are weights
        cells = [span.name, mib_cell(span.start.allocated_bytes), mib_cell(m.allocated_bytes), activation]
        cells += [mib_cell(m.reserved_bytes)] if record.cached else []
        rows.append([*cells, mib_cell(m.device_bytes), seconds_cell(span.seconds)])
    return table(rows)


def _largest_moments(record: RunRecord, texts: Texts) -> str:
    """The three highest allocated peaks of different stages, each named by the innermost span that saw it."""
    leaves = sorted(_leaves(record.stages, ""), key=lambda item: -item[1].peak.allocated_bytes)
    lines = [texts("largest_moments")]
    for path, span in leaves[:3]:
        lines.append(f"  {human(span.peak.allocated_bytes):>14}  {shown(path)}")
    return "\n".join(lines)


def _leaves(spans: Sequence[Span], path: str) -> Iterator[tuple[str, Span]]:
    """For each span the innermost one that saw its peak; a peak between the children is the span's own."""
    for span in spans:
        here = f"{path} / {span.name}" if path else span.name
        inner = max(_leaves(span.children, here), key=lambda item: item[1].peak.allocated_bytes, default=None)
        own = inner is None or inner[1].peak.allocated_bytes < span.peak.allocated_bytes
        yield (here, span) if own or inner is None else inner


def _alive(alive: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Largest first; equal ones, which older records list one by one, are one line."""
    found: dict[str, list[int]] = {}
    for what, size in alive:
        found.setdefault(what, []).append(size)
    for what, sizes in sorted(found.items(), key=lambda item: -sum(item[1])):
        yield f"  {human(sum(sizes)):>14}  {f'{len(sizes)} x ' if len(sizes) > 1 else ''}{shown(what)}"


def _remedy(record: RunRecord, texts: Texts) -> str:
    """What says how it would fit, as commands to copy: the same request, planned."""
    advice = texts("advise_dir")
    try:
        config = RunConfig.from_dict(record.config)
    except InputError:  # written by another version: what was asked for cannot be said in full
        return f"{texts('make_it_fit')}\n  {advice}"
    gpu = card_of_run(record.device, config.gpu)
    limit = record.budget_bytes or (gpu.total_bytes if gpu else None)
    vram = f"{limit // MIB}MiB" if limit else "auto"
    card = gpu.argument if gpu else None
    command = plan_command(config.request, config.strategy, vram=vram, ram=None, gpu=card, link=config.link)
    return f"{texts('make_it_fit')}\n  {shown(command, MAX_COMMAND)}\n  {advice}"


def show(text: str, stream: TextIO | None = None) -> None:
    """Prints text; on a terminal first lines and the heads of tables are bold, what fits is green, what does not is red."""
    stream = sys.stdout if stream is None else stream
    if stream is None or not stream.isatty():
        print(text, end="", file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    drawn = Text()
    lines = [*text.splitlines(), ""]
    for index, (line, following) in enumerate(pairwise(lines)):
        heading = index == 0 or (len(following) > 1 and set(following) <= {"-", "="})
        drawn.append(line, style="bold" if heading else "").append("\n")
    drawn.highlight_regex(_GOOD, "green")
    drawn.highlight_regex(_BAD, "bold red")
    Console(file=stream).print(drawn, end="", soft_wrap=True)


def listed(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table of the rows; nothing where there are none."""
    found = list(rows)
    return table([heads, *found]) if found else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Every cell in one line: names in it may come from outside."""
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        spaces = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + spaces[0], *(space + cell for cell, space in zip(row[1:], spaces[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * _width(lines[0]))
    return "\n".join(lines)


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return len(text) + sum(unicodedata.east_asian_width(char) in "WF" for char in text if not char.isascii())

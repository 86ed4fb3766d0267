"""The terminal summary of one run: peak first, then components, stages and the three largest moments. No torch.

Text is made plain, then shown: on a terminal with the same words in bold and colour.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TextIO

from wanvram.command_line import MAX_COMMAND, plan_command
from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.record import Memory, RunRecord, Span
from wanvram.simulate.gpus import card_of_run
from wanvram.units import MIB, human, mib_cell, seconds

__all__ = ["listed", "show", "summarize", "table"]

_BAD = r"\b(DOES NOT FIT|does not fit|FAILED|[Oo]ut of memory)\b"
_GOOD = r"(?<!whether it )\bfits\b"


def summarize(record: RunRecord) -> str:
    """Multi-line text; exact for a given record."""
    parts = [_headline(record), "", _components(record), "", _stages(record), "", _largest_moments(record)]
    if record.failure is not None and record.failure.alive:
        parts += ["", "alive when it failed:", *_alive(record.failure.alive)]
    if record.failure is not None and record.failure.kind == "oom":
        parts += ["", _remedy(record)]
    if record.notes:
        parts += ["", *(f"note: {shown(note)}" for note in record.notes)]
    return "\n".join(parts) + "\n"


def _headline(record: RunRecord) -> str:
    kind = "SIMULATED, nothing was run on a GPU" if record.simulated else "MEASURED"
    request = record.config.get("request", {})
    asked = [shown(request.get(key) or "-", 60) for key in ("task", "size", "frame_num")]
    name = shown(record.config.get("name") or "run")
    lines = [f"{name}: {' '.join(asked)} frames", f"{kind} ({shown(record.device)})"]
    peak = record.peak_span()
    if peak is not None:
        m = peak.peak
        device = f", device {human(m.device_bytes)}" if m.device_bytes is not None else ""
        lines.append(
            f"Peak: allocated {human(m.allocated_bytes)}, reserved {human(m.reserved_bytes)}{device} in {shown(peak.name)}"
        )
        lines.append(_why(peak))
    if record.simulated and record.times.in_all_seconds is not None and record.failure is None:
        lines.append(f"Time: {seconds(record.times.in_all_seconds)} in all, from the command to its end")
    lines.append(_verdict(record))
    return "\n".join(lines)


def _why(peak: Span) -> str:
    start = peak.start.allocated_bytes
    activation = peak.peak.allocated_bytes - start
    if peak.kind == "load" and peak.component is None:
        return f"      {human(activation)} of libraries' workspaces, before any weights"
    if peak.kind == "load":
        return f"      {human(start)} there when loading began + {human(activation)} of weights loaded"
    cause = "activations of the stage" if activation > start else "weights and tensors already there"
    return f"      {human(start)} there when the stage began + {human(activation)} activation: mostly {cause}"


def _verdict(record: RunRecord) -> str:
    if record.failure is not None:
        where = f" in {shown(record.failure.stage)}" if record.failure.stage else ""
        return f"FAILED ({record.failure.kind}){where}: {shown(record.failure.message)}"
    if record.budget_bytes is not None:
        word = "fits" if record.fits else "DOES NOT FIT"
        return f"Verdict: {word} in {human(record.budget_bytes)}"
    return "Verdict: no memory limit was given (--vram 8GiB asks whether it fits)"


def _components(record: RunRecord) -> str:
    rows = [["component", "parameters", "base MiB", "host MiB", "activation MiB"]]
    rows += [
        [c.name, f"{c.parameters:,}", mib_cell(c.base_bytes), mib_cell(c.host_bytes), mib_cell(c.activation_bytes)]
        for c in record.components
    ]
    return table(rows)


def _stages(record: RunRecord) -> str:
    rows = [["stage", "start MiB", "peak MiB", "activation MiB", "reserved MiB", "device MiB", "time"]]
    for span in record.stages:
        time = seconds(span.seconds) if span.seconds is not None else "-"
        rows.append([span.name, mib_cell(span.start.allocated_bytes), *_peak_cells(span), time])
    return table(rows)


def _peak_cells(span: Span) -> list[str]:
    m: Memory = span.peak
    activation = "-" if span.kind == "load" else mib_cell(span.activation_bytes)  # what loading adds are weights
    return [mib_cell(m.allocated_bytes), activation, mib_cell(m.reserved_bytes), mib_cell(m.device_bytes)]


def _largest_moments(record: RunRecord) -> str:
    """The three highest allocated peaks of different stages, each named by the innermost span that saw it."""
    leaves = sorted(_leaves(record.stages, ""), key=lambda item: -item[1].peak.allocated_bytes)
    lines = ["largest moments:"]
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


def _remedy(record: RunRecord) -> str:
    """What says how it would fit, as commands to copy: the same request, planned."""
    advice = "wanvram analyze DIR --advice    (DIR: this run's directory; computes what each change saves)"
    try:
        config = RunConfig.from_dict(record.config)
    except InputError:  # written by another version: what was asked for cannot be said in full
        return f"what would make it fit:\n  {advice}"
    gpu = card_of_run(record.device, config.gpu)
    limit = record.budget_bytes or (gpu.total_bytes if gpu else None)
    vram = f"{limit // MIB}MiB" if limit else "auto"
    command = plan_command(config.request, config.strategy, vram=vram, ram=None, gpu=gpu.argument if gpu else None)
    return f"what would make it fit:\n  {shown(command, MAX_COMMAND)}\n  {advice}"


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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)

"""Turn recorded runs into a report: one HTML file that opens from disk, Markdown, or plain text.

examples:
  wanvram report profiler_logs/baseline                         writes profiler_logs/baseline/report.html
  wanvram report profiler_logs -o docs/report.html --force      every run in the directory, compared; replaces the file
  wanvram report profiler_logs/a profiler_logs/b --format md    Markdown on stdout
  wanvram report profiler_logs/baseline --lang zh --format text     Chinese, as HTML and Markdown too
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.input_files import state_of, whole
from wanvram.record import write_atomically
from wanvram.report.compare import runs_table
from wanvram.report.findings import alike, answer, card_of, ranked, ranks, together
from wanvram.report.html import html_report
from wanvram.report.markdown import markdown_report
from wanvram.report.runs import Run, asked, find_runs
from wanvram.report.terminal import show, summarize
from wanvram.report.translations import LANGUAGES, Texts

__all__ = ["prepare_parser", "run"]

_SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md", ".txt": "text"}


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory, or a directory of them")
    add("-o", "--output", type=Path, help="file to write; its ending says the format")
    add("--format", choices=("html", "md", "text"), help="default: that of --output, else html")
    add("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    add("--force", action="store_true", help="replace the file that is already there")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def run(args: argparse.Namespace) -> int:
    kind = _format(args.format, args.output)
    output = args.output
    if output is None and kind == "html" and not args.json:
        output = _common(args.runs) / "report.html"
    if output is not None and state_of(output) is not None and not args.force:
        raise InputError(f"{shown(output)} exists; --force replaces it")
    runs = find_runs(args.runs)
    text = "" if output is None and args.json else _report(runs, kind, args.lang)
    if output is not None:
        write_atomically(output, text)
    if args.json:
        written = None if output is None else str(output)
        found = [_summary(run, Texts(args.lang)) for run in runs]
        print(json.dumps({"schema": 1, "written": written, "runs": found}, ensure_ascii=False))
    elif output is not None:
        print(f"Wrote {shown(output)}")
    elif kind == "text":
        show(text)
    else:
        print(text, end="")
    return 0


def _format(wanted: str | None, output: Path | None) -> str:
    if output is None:
        return wanted or "html"
    ending = _SUFFIXES.get(output.suffix.lower())
    if ending is None:
        raise InputError(f"{output}: a report ends in {', '.join(_SUFFIXES)}")
    if wanted is not None and wanted != ending:
        raise InputError(f"--format {wanted} contradicts the ending of {output}; leave one of them out")
    return ending


def _common(paths: Sequence[Path]) -> Path:
    """The directory that holds everything reported on."""
    if len(paths) == 1:
        return paths[0]
    return Path(os.path.commonpath([whole(path) for path in paths]))


def _report(runs: Sequence[Run], kind: str, language: str) -> str:
    if kind == "html":
        return html_report(runs, language)
    if kind == "md":
        return markdown_report(runs, language)
    return _text(runs, Texts(language))


def _text(runs: Sequence[Run], texts: Texts) -> str:
    """Several runs: which is lowest, all in one table, then each by its label. The answer comes before a run's tables."""
    parts = []
    if len(runs) > 1:
        parts = [together(runs, texts) + "\n", *_tables(alike(runs), texts)]
    for run in runs:
        label = shown(run.label)
        heading = [label, "=" * len(label)] if len(runs) > 1 else []
        said = [sentence for sentence in asdict(answer(run, texts)).values() if sentence]
        parts.append("\n".join([*heading, *said, "", summarize(run.record, texts)]))
    return "\n".join(parts)


def _tables(groups: Sequence[Sequence[Run]], texts: Texts) -> Iterator[str]:
    """A table of runs for each thing that was asked for."""
    for group in groups:
        if len(groups) > 1:
            task, size, frames = asked(group[0].record)
            yield f"{texts('asked', task=task, size=size, frames=frames)}\n{ranked(group, texts)}\n"
        yield runs_table([(run.label, run.record) for run in group], ranks(group), texts) + "\n"


def _summary(run: Run, texts: Texts) -> dict[str, Any]:
    record, peak, where = run.record, run.record.peak(), run.record.peak_span()
    return {
        "label": run.label,
        "simulated": record.simulated,
        "fits": record.fits,
        "peak_device_bytes": peak.device_bytes if peak else None,
        "peak_reserved_bytes": peak.reserved_bytes if peak else None,
        "peak_allocated_bytes": peak.allocated_bytes if peak else None,
        "stage": where.name if where else None,
        "component": where.component if where else None,
        "smallest_card_gib": card_of(record),
        "failure": record.failure.kind if record.failure else None,
        **asdict(answer(run, texts)),
    }

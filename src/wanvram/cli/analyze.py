"""Say what used the memory: of a run directory, memory_events.json, a torch.profiler trace or an allocator snapshot.

examples:
  wanvram analyze profiler_logs/baseline                           who owns the peak, fragmentation, stages, growth
  wanvram analyze profiler_logs/baseline --advice                  and the three changes that lower the peak most
  wanvram analyze profiler_logs/baseline/memory_events.json
  wanvram analyze profiler_logs/baseline/trace.json                of a run with logging.trace; any size, also gzipped
  wanvram analyze profiler_logs/baseline/snapshot.pickle --json    never unpickled: no code in it is run

What a file is, is told from its content, not its name. Of a trace and a snapshot at most 1 GiB of memory is used.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanvram.analysis.events import read_events
from wanvram.analysis.snapshot import read_snapshot, snapshot_timeline
from wanvram.analysis.stages import analyze_run
from wanvram.analysis.trace import read_trace
from wanvram.cli.common import progress_printer
from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.record import RunRecord
from wanvram.report.analysis_text import events_text, run_text, snapshot_text, trace_text
from wanvram.report.answer import advice_first
from wanvram.report.runs import read_run
from wanvram.run.directory import TRACE_NAME

__all__ = ["prepare_parser", "run"]

HEAD_BYTES = 1 << 16
Result = tuple[str, dict[str, Any]]  # text, JSON
_EVENTS = re.compile(rb'\s*\[\s*(\]|\{\s*"(name|timestamp|memory_log)"\s*:.*"memory_log")', re.DOTALL)
_RECORD = re.compile(rb'\s*\{\s*"schema"\s*:')


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory, events, trace or snapshot")
    parser.add_argument(
        "--advice",
        action="store_true",
        help="of a run: simulate which changes lower the peak most, into its advice.json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def run(args: argparse.Namespace) -> int:
    kind, path = _kind(args.path)
    if args.advice:
        _advise(kind, path, args)
    text, document = _READERS[kind](path)
    if args.json:
        print(json.dumps({"kind": kind, "path": str(path), **document}, ensure_ascii=False))
    else:
        print(text, end="")
    return 0


def _advise(kind: str, path: Path, args: argparse.Namespace) -> None:
    if kind != "run":
        raise InputError(f"--advice needs a run directory, whose configuration can be simulated; {path} is {kind}")
    from wanvram.run.advice import advise, write_advice

    record = RunRecord.read(path / "record.json")
    write_advice(path, advise(RunConfig.from_dict(record.config), record, show=progress_printer(args)))


def _kind(path: Path) -> tuple[str, Path]:
    """What is at the path, and the path of just that. Raises InputError."""
    if path.name == TRACE_NAME and not path.exists() and not _nearby(path) and (path.parent / "record.json").is_file():
        print(f"{path.parent} was not traced (logging.trace); this is what its record says", file=sys.stderr)
        return "run", path.parent
    if path.is_dir():
        return _in_directory(path)
    head = _head(path).removeprefix(codecs.BOM_UTF8)
    if head[:1] == b"\x80" or path.suffix in (".pickle", ".pkl"):  # what a pickle of protocol 2 or later begins with
        return "snapshot", path
    if _EVENTS.match(head):
        return "events", path
    if _RECORD.match(head):
        if path.name not in ("record.json", "timeline.json"):
            raise InputError(f"{path} looks like a file of a run directory; give the directory")
        return "run", path.parent
    return "trace", path  # its reader says what is wrong with anything else


def _in_directory(path: Path) -> tuple[str, Path]:
    """A run without its record, because it was killed, still has its events."""
    if (path / "record.json").is_file():
        return "run", path
    for kind, pattern in (("events", "memory_events*.json"), ("trace", "*.pt.trace.json*"), ("snapshot", "*.pickle")):
        found = sorted(path.glob(pattern))
        if found:
            return kind, max(found, key=lambda file: file.stat().st_mtime_ns) if kind == "events" else found[-1]
    runs = sorted(inside.parent for inside in path.glob("*/record.json"))
    hint = f"; it holds {len(runs)} runs, such as {runs[0]}: analyze one, or compare or report them all" if runs else ""
    raise InputError(f"{path} holds no record.json, no memory_events.json, no trace and no snapshot{hint}")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            return gzip.GzipFile(fileobj=raw).read(HEAD_BYTES) if packed else raw.read(HEAD_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return b""  # the reader of traces says that it breaks off
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist{_nearby(path)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _nearby(path: Path) -> str:
    traces = sorted(path.parent.glob("**/*.pt.trace.json*"))[:1] if "trace" in path.name else []
    return f"; there is {traces[0]}" if traces else ""


def _analyze_run(path: Path) -> Result:
    found = read_run(path)
    analysis = analyze_run(found.record, _timeline(path) if found.exact else None)
    document = found.record.to_json() | {
        "analysis": analysis.to_json(),
        "advice": [asdict(item) for item in advice_first(found.advice)],
    }
    return run_text(found.record, analysis, found.advice), document


def _timeline(path: Path) -> dict[str, Any]:
    """As it was written: read_run has checked its size and values, and keeps only what a report draws."""
    return dict(json.loads((path / "timeline.json").read_text(encoding="utf-8"), parse_constant=lambda _: None))


def _analyze_events(path: Path) -> Result:
    summary = read_events(path)
    return events_text(summary), summary.to_json()


def _analyze_trace(path: Path) -> Result:
    summary = read_trace(path)
    document = {"schema": 1, **asdict(summary)}
    document.pop("path")
    return trace_text(summary), document


def _analyze_snapshot(path: Path) -> Result:
    snapshot = read_snapshot(path)
    main = snapshot.main
    figures = {
        "peak_allocated_bytes": main.peak_allocated_bytes,
        "peak_active_bytes": main.peak_active_bytes,
        "peak_reserved_bytes": main.peak_reserved_bytes,
        "allocated_bytes": main.allocated_bytes,
        "reserved_bytes": main.reserved_bytes,
    }
    document = {
        "schema": 1,
        "device": main.device,
        "events": main.events,
        "complete": main.complete,
        **figures,
        "peak": {
            "seconds": main.peak.seconds,
            "alive": [asdict(group) for group in main.peak.alive],
            "holes": [asdict(hole) for hole in main.peak.holes],
        },
        "out_of_memory": [asdict(refusal) for refusal in main.out_of_memory],
        "timeline": snapshot_timeline(snapshot),
        "notes": list(snapshot.notes),
    }
    return snapshot_text(snapshot), document


_READERS: dict[str, Callable[[Path], Result]] = {
    "run": _analyze_run,
    "events": _analyze_events,
    "trace": _analyze_trace,
    "snapshot": _analyze_snapshot,
}

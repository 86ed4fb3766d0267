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
import json
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from wanvram.advice import write_advice
from wanvram.analysis.events import read_events
from wanvram.analysis.snapshot import read_snapshot, snapshot_timeline
from wanvram.analysis.stages import analyze_run
from wanvram.analysis.trace import read_trace
from wanvram.analysis.trace_summary import TraceSummary
from wanvram.cli.common import progress_printer
from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.input_files import DAMAGED_GZIP, state_of, unpacked, whole
from wanvram.record import RunRecord
from wanvram.report.analysis_text import events_text, run_text, snapshot_text, trace_text
from wanvram.report.findings import advice_first
from wanvram.report.runs import read_run
from wanvram.run.directory import TRACE_NAME
from wanvram.units import mib

__all__ = ["prepare_parser", "run"]

HEAD_BYTES = 1 << 16
Result = tuple[str, dict[str, Any]]  # text, JSON
_EVENTS = re.compile(rb'\s*\[\s*(\]|\{\s*"(name|timestamp|memory_log)"\s*:.*"memory_log")', re.DOTALL)
_RECORD = re.compile(rb'\s*\{\s*"schema"\s*:')
_TRACE_HEAD = re.compile(rb'\s*(\[\s*\{|\{.*"traceEvents"\s*:)', re.DOTALL)
_PICKLE = re.compile(r"\.(pickle|pkl)(\.gz)?$", re.IGNORECASE)
_JSON = re.compile(r"\.json(\.gz)?$", re.IGNORECASE)
_NAMED = (
    ("events", re.compile(r"^memory_events(-\d+)?\.json$")),
    ("trace", re.compile(r"trace.*\.json(\.gz)?$", re.IGNORECASE)),
    ("snapshot", _PICKLE),
    ("unnamed snapshot", re.compile(r"snapshot[^.]*$", re.IGNORECASE)),
)
MAX_FILES = 10_000  # looked at in a folder
MAX_LOOKED_INTO = 100  # JSON files that are opened to see what they are
MOST_DIFFERENT = 0.01  # of the record's peak, for a trace's peak to be the same


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="run directory, events, trace or snapshot")
    add(
        "--advice",
        action="store_true",
        help="of a run: simulate which changes lower the peak most, into its advice.json",
    )
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


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
        raise InputError(
            f"--advice needs a run directory, whose configuration can be simulated; {shown(path)} is {kind}"
        )
    from wanvram.predict.advice import advise

    record = RunRecord.read(path / "record.json")
    if record.foreign:
        raise InputError(f"--advice: {shown(path)} is of other people's code, whose settings are not known here")
    write_advice(path, advise(RunConfig.from_dict(record.config), record, show=progress_printer(args)))


def _kind(path: Path) -> tuple[str, Path]:
    """What is at the path, and the path of just that. Raises InputError."""
    state = state_of(path)
    if state is None:
        near = _nearby(path)
        if path.name != TRACE_NAME or near or not state_of(path.parent / "record.json"):
            raise InputError(f"{shown(path)} does not exist{near}")
        _say(f"{path.parent} was not traced (logging.trace); this is what its record says")
        return "run", path.parent
    if stat.S_ISDIR(state.st_mode):
        return _in_directory(path)
    kind = _kind_of_file(path)
    if kind != "run":
        return kind, path
    if path.name not in ("record.json", "timeline.json"):
        raise InputError(f"{shown(path)} looks like a file of a run directory; give the directory")
    return kind, path.parent


def _kind_of_file(path: Path) -> str:
    head = _head(path)
    if head[:1] == b"\x80" or _PICKLE.search(path.name):  # what a pickle of protocol 2 or later begins with
        return "snapshot"
    if _EVENTS.match(head):
        return "events"
    return "run" if _RECORD.match(head) else "trace"  # the reader of traces says what is wrong with anything else


def _in_directory(path: Path) -> tuple[str, Path]:
    """A run, or what others write into a folder: traces and snapshots of any name, of one or several ranks, up to two folders
    deep. A run without its record, because it was killed, still has its events.
    """
    if state_of(path / "record.json"):
        return "run", path
    for inside in ("*", "*/*", "*/*/*"):
        files = [p for p in islice(path.glob(inside), MAX_FILES) if _is_regular(p)]
        found = _found(files)
        if found is not None:
            kind, same = found
            if len(same) > 1:
                _say(
                    f"{path} holds {len(same)} of the kind {kind}; this is the last by name, {same[-1].relative_to(path)}"
                )
            return kind, same[-1]
    runs = sorted(inside.parent for inside in path.glob("*/record.json"))
    hint = f"; it holds {len(runs)} runs, such as {runs[0]}: analyze one, or compare or report them all" if runs else ""
    raise InputError(
        f"{shown(path)} holds no record.json, no memory_events.json, no trace and no snapshot{shown(hint)}"
    )


def _found(files: Sequence[Path]) -> tuple[str, list[Path]] | None:
    """Events before traces before snapshots; of traces those that are named so, else any JSON that is one."""
    named = {kind: sorted(p for p in files if pattern.search(p.name)) for kind, pattern in _NAMED}
    for kind in ("events", "trace", "snapshot"):
        if named[kind]:
            return kind, named[kind]
    others = sorted(p for p in files if _JSON.search(p.name) and p.name != "timeline.json")[:MAX_LOOKED_INTO]
    traces = [p for p in others if _kind_of_file(p) == "trace" and _TRACE_HEAD.match(_head(p))]
    if traces:
        return "trace", traces
    return ("snapshot", named["unnamed snapshot"]) if named["unnamed snapshot"] else None


def _is_regular(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _head(path: Path) -> bytes:
    with unpacked(path) as file, suppress(*DAMAGED_GZIP):  # the reader of traces says that it breaks off
        return file.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    return b""


def _nearby(path: Path) -> str:
    traces = sorted(path.parent.glob("**/*.pt.trace.json*"))[:1] if "trace" in path.name else []
    return f"; there is {shown(traces[0])}" if traces else ""


def _say(sentence: str) -> None:
    print(shown(sentence), file=sys.stderr)


def _analyze_run(path: Path) -> Result:
    found = read_run(path)
    analysis = analyze_run(found.record, found.timeline if found.exact else None)
    document = found.record.to_json() | {
        "analysis": analysis.to_json(),
        "advice": [asdict(item) for item in advice_first(found.advice)],
    }
    return run_text(found.record, analysis, found.advice), document


def _analyze_events(path: Path) -> Result:
    summary = read_events(path)
    return events_text(summary), summary.to_json()


def _analyze_trace(path: Path) -> Result:
    summary = read_trace(path)
    summary = replace(summary, notes=(*summary.notes, *_beside_record(path, summary)))
    document = {"schema": 1, **asdict(summary)}
    document.pop("path")
    return trace_text(summary), document


def _beside_record(path: Path, trace: TraceSummary) -> Iterator[str]:
    """Why the peak of a run's trace is not that of its record, where they differ."""
    directory = next((d for d in list(whole(path).parents)[:2] if _is_regular(d / "record.json")), None)
    try:
        record = RunRecord.read(directory / "record.json") if directory else None
    except InputError:
        return
    peak = record.peak() if record else None
    if record is None or peak is None or trace.main is None:
        return
    kind = trace.main.device.partition(":")[0]
    counted, recorded = trace.main.peak_allocated_bytes, peak.allocated_bytes
    if not record.device.startswith(kind) or abs(counted - recorded) <= MOST_DIFFERENT * recorded:
        return
    why_not = "a trace covers the steps that were traced, the record the whole run"
    if kind == "cpu":
        why_not += "; and on the CPU a trace counts every allocation of the process, also buffers inside an operator, "
        why_not += "the record tensors alone"
    yield f"the peak here is {mib(counted)}, that of the run's record {mib(recorded)}: {why_not}"


def _analyze_snapshot(path: Path) -> Result:
    snapshot = read_snapshot(path)
    main = snapshot.main
    facts = ("device", "events", "recorded", "complete")
    sizes = ("peak_allocated_bytes", "peak_active_bytes", "peak_reserved_bytes", "allocated_bytes", "reserved_bytes")
    document = {
        "schema": 1,
        **_picked(main, *facts, *sizes),
        "peak": {
            "seconds": main.peak.seconds,
            "alive": [{"bytes": g.bytes, "count": g.count, "where": g.operation} for g in main.peak.alive],
            "by_place": [{"bytes": o.bytes, "count": o.count, "where": o.name} for o in main.by_place()],
            "holes": [_picked(hole, "bytes", "segment", "offset", "why") for hole in main.peak.holes],
        },
        "out_of_memory": [asdict(refusal) for refusal in main.out_of_memory],
        "host": asdict(snapshot.host) if snapshot.host else None,
        "devices": [_picked(device, "device", "recorded", "peak_allocated_bytes") for device in snapshot.devices],
        "timeline": snapshot_timeline(snapshot).to_json(),
        "notes": list(snapshot.notes),
    }
    return snapshot_text(snapshot), document


def _picked(source: object, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


_READERS: dict[str, Callable[[Path], Result]] = {
    "run": _analyze_run,
    "events": _analyze_events,
    "trace": _analyze_trace,
    "snapshot": _analyze_snapshot,
}

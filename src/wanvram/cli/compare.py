"""Compare runs stage by stage and component by component; fail a build when memory grew.

examples:
  wanvram compare profiler_logs/baseline profiler_logs/memory_opt
  wanvram compare expected.json profiler_logs/baseline --fail-if 'peak.reserved_bytes > +2%'
  wanvram compare profiler_logs/baseline --fail-if 'stages.denoise.peak_allocated_bytes > 8GiB'
  wanvram compare profiler_logs --json
  wanvram compare simulated snapshot.pickle       a simulated script, and PyTorch's snapshot of it on a GPU

Differences count from the first run. A limit with a sign counts from it, too; one without a sign is absolute. A run that
failed meets every condition. Exit code 1 if a condition is met, 2 if it cannot be judged.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from wanvram.analysis.compare import compare, judge, parse_condition
from wanvram.report.compare import comparison_text, read_runs, violations_text
from wanvram.report.runs import pairs

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directory, folder of them, record.json, or a snapshot")
    fails = "exit code 1 if true of any run after the first, as in 'peak.reserved_bytes > +2%%'; may be repeated"
    add("--fail-if", action="append", default=[], metavar="CONDITION", help=fails)
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def run(args: argparse.Namespace) -> int:
    conditions = [parse_condition(text) for text in args.fail_if]
    runs = read_runs(args.runs)
    comparison = compare([r.label for r in runs], [r.record for r in runs], pairs(runs))
    violations = judge(comparison, conditions)
    if args.json:
        document = comparison.to_json() | {"violations": [asdict(v) for v in violations]}
        print(json.dumps(document, ensure_ascii=False))
    else:
        print(comparison_text(comparison), end="")
        print("\n" + violations_text(violations) if violations else "", end="")
    return 1 if violations else 0

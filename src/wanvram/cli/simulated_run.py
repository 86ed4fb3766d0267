"""What the verbs that simulate foreign code share: where the result goes, and the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from wanvram.errors import InputError
from wanvram.output_files import whole_file, writing

if TYPE_CHECKING:
    from wanvram.foreign.session import SimulatedRun

__all__ = ["add_measured_flag", "check_output", "show_run"]


def add_measured_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="table of `wanvram harvest`: what libraries took on a real GPU"
    )


def check_output(args: argparse.Namespace) -> None:
    """Raises InputError where the run directory holds something and --force was not given."""
    output = args.output
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())) and not args.force:
        raise InputError(f"-o {output} is not empty; give --force to replace what is in it")


def show_run(
    run: SimulatedRun, args: argparse.Namespace, name: str, description: str, text_to: TextIO | None = None
) -> int:
    """The document on stdout with --json, else the report on text_to (default: stdout); 3 where the run does not fit, else 0."""
    from wanvram.foreign.report import report_text, run_json

    document = run_json(run)
    if args.output is not None:
        _write(run, document, args.output, (name, description))
    if args.json:
        print(json.dumps(document, ensure_ascii=False))
    else:
        sys.stdout.flush()
        print(report_text(run), end="", file=text_to or sys.stdout)
    return 3 if run.fits is False else 0


def _write(run: SimulatedRun, document: object, directory: Path, called: tuple[str, str]) -> None:
    """record.json, timeline.json, simulation.json and memory_viz.pickle."""
    from wanvram.foreign.run_record import record_of
    from wanvram.report.memory_viz import export_timeline

    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    record_of(run, *called).write(directory / "record.json")
    for name, content in (("simulation.json", document), ("timeline.json", run.timeline().to_json())):
        with writing(directory / name), whole_file(directory / name) as beside:
            beside.write_text(json.dumps(content), encoding="utf-8")
    export_timeline(directory / "memory_viz.pickle", run.allocations)

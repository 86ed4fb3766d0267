"""Flags and endings that several verbs share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from wanvram.config import RunConfig
from wanvram.errors import DeviceError, InputError
from wanvram.foreign_text import shown
from wanvram.knobs import EXPANDABLE_SEGMENTS
from wanvram.machine.allocator_settings import check_plain, put_in_force
from wanvram.machine.launched import launched
from wanvram.machine.nvml import first_gpu
from wanvram.matrix.jobs import exit_code
from wanvram.planner.search import planned_base
from wanvram.progress_stream import ProgressStream
from wanvram.record import RunRecord
from wanvram.report.event_text import event_text
from wanvram.report.terminal import summarize
from wanvram.run_events import TellRun
from wanvram.sharing import LINKS
from wanvram.units import parse_memory

__all__ = [
    "add_device_flags",
    "add_link_flag",
    "add_output_flags",
    "finish",
    "memory_limit",
    "progress_printer",
    "run_printer",
    "settle_allocator",
    "stated",
]


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "simulated", "cpu"), help="where to run (default: auto)")
    add("--gpu", metavar="CARD", help="card to simulate: rtx4090, FILE.yaml (wanvram check --cards; default: h200)")
    add_link_flag(parser)
    add("--vram", help="memory the run may use, for example 8GiB; the answer says whether it fits")


def add_link_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--link", choices=LINKS, help="what joins several simulated cards; host: RAM (default: the card's usual)"
    )


def add_output_flags(parser: argparse.ArgumentParser, default: str) -> None:
    add = parser.add_argument
    add("-o", "--output", type=Path, help=f"run directory (default: {default})")
    add("--force", action="store_true", help="replace the run that is already in the directory")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def memory_limit(args: argparse.Namespace) -> int | None:
    """Bytes of --vram, None when it is absent. Raises InputError that names the flag."""
    return None if args.vram is None else stated("vram", args.vram)


def stated(flag: str, text: str) -> int:
    """Bytes that a flag states. Raises InputError that names the flag."""
    try:
        return parse_memory(text)
    except InputError as error:
        raise InputError(f"--{flag}: {error}") from error


def settle_allocator(config: RunConfig, *, to_be_planned: bool) -> None:
    """Puts the allocator's settings in force, before torch is imported. Raises InputError where the user's contradict the strategy.

    to_be_planned: those of a plan, which knows no other settings. Only where a GPU may be used: whoever simulates may have any.
    """
    if config.device not in ("auto", "cuda"):
        return
    with suppress(DeviceError):
        first_gpu()
        if to_be_planned:
            check_plain()
        strategy = planned_base(config.strategy) if to_be_planned else config.strategy
        put_in_force(EXPANDABLE_SEGMENTS.of(strategy))


def progress_printer(args: argparse.Namespace) -> Callable[[str], None] | None:
    """Progress on stderr with the time since the start; quiet under --json only if stderr is not a terminal, and where another
    process of the run speaks."""
    stream = ProgressStream(sys.stderr)
    return None if (args.json and not stream.isatty()) or not launched().is_first else stream.line


def run_printer(args: argparse.Namespace) -> TellRun | None:
    """The events of a run as progress."""
    line = progress_printer(args)
    return None if line is None else lambda event: line(event_text(event))


def finish(record: RunRecord, args: argparse.Namespace, directory: Path | None, videos: Iterable[Path] = ()) -> int:
    """Prints the record and the files that are there; exit code 0, 1 for a failed run, 3 when it does not fit the memory given."""
    if args.json:
        print(json.dumps(record.to_json(), ensure_ascii=False))
    else:
        print(summarize(record), end="")
        if directory is not None:
            for path in sorted({*(p for p in directory.iterdir() if p.is_file()), *videos}):
                print(f"Wrote {shown(path)}")
    return exit_code(record)

"""Run a PyTorch script on this machine's GPU and write down what its library operations took, for simulations elsewhere.

Convolutions, sorts, decompositions and operations of other libraries take memory beside their results by rules that are not
published. The table says what each took with the shapes of this script; `wanvram simulate --measured FILE` counts that in place of
a rule. The script runs as it is, once; its own peak counters are reset by the measurement. docs/your-own-code.md.

examples:
  wanvram harvest my_pipeline.py --steps 2
  wanvram harvest -o h200.json script.py
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.input_files import state_of
from wanvram.units import human

__all__ = ["prepare_parser", "run"]

_SHOWN = 10


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", type=Path, metavar="FILE", help="default: measured.json")
    add("--force", action="store_true", help="replace the file that is already there")
    add("--json", action="store_true", help="print the table on stdout, nothing else; no file unless -o")
    add("script", type=Path, help="a Python file")
    add("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")


def run(args: argparse.Namespace) -> int:
    """0; 1 if the script failed, whose measured operations are written all the same."""
    output = args.output or (None if args.json else Path("measured.json"))
    if output is not None and state_of(output) is not None and not args.force:
        raise InputError(f"-o {shown(output)} exists; give --force to replace it")
    from wanvram.foreign.harvest import LibraryWatch, measuring_device
    from wanvram.foreign.script import check_script, run_script

    check_script(args.script)
    measuring_device()
    watch = LibraryWatch()
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        status = run_script(args.script, args.arguments, inside=watch, verb="harvest")
    table = watch.table(measuring_device())
    if output is not None:
        table.write(output)
    if args.json:
        print(json.dumps(table.to_json()))
        return 1 if status else 0
    sys.stdout.flush()
    print(f"{len(table.operations)} operations measured on {table.device.gpu}", file=sys.stderr)
    for entry in table.operations[:_SHOWN]:
        print(f"  {human(entry.bytes):>12}  {entry.operation}  {shown(entry.arguments, 100)}", file=sys.stderr)
    print(f"Wrote {shown(output)}", file=sys.stderr)
    return 1 if status else 0

"""Run any PyTorch inference script on a card that is not there: what it takes, who owns it, whether it fits.

The script itself is not changed and needs no GPU; its weights need not be real. What is right, what is a rule and what is refused:
docs/your-own-code.md. The script's output passes through and the report goes to stderr; with --json the document alone is on stdout.

examples:
  wanvram simulate --gpu rtx4090 my_pipeline.py --steps 4
  wanvram simulate --gpu rtx4060 --vram 8GiB --json my_pipeline.py
  wanvram simulate --gpu h100 -o simulated script.py
  wanvram simulate --gpu h200 --measured h200.json script.py
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from wanvram.cli.common import memory_limit
from wanvram.cli.simulated_run import add_measured_flag, check_output, show_run
from wanvram.knobs import EXPANDABLE_SEGMENTS

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpu", metavar="CARD", help="card to simulate: rtx4090, FILE.yaml (default: h200, measured)")
    add("--vram", help="memory the script may use, for example 24GiB; exit code 3 if it does not fit")
    segments = "the allocator's setting of that name"
    add(EXPANDABLE_SEGMENTS.flag, dest="expandable", action="store_true", help=segments)
    add("--eager", action="store_true", help="run what torch.compile is asked for eagerly and say so")
    add_measured_flag(parser)
    add("-o", "--output", type=Path, help="run directory: its record, timeline and the allocator's snapshot")
    add("--force", action="store_true", help="replace what is already in the directory")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")
    add("script", type=Path, help="a Python file")
    add("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")


def run(args: argparse.Namespace) -> int:
    """0; 1 if the script itself failed, 3 if it ran out of the card's memory."""
    check_output(args)
    limit = memory_limit(args)
    from wanvram.foreign.script import run_script
    from wanvram.foreign.session import simulated_gpu
    from wanvram.simulate.gpus import DEFAULT_GPU

    settings = {"expandable": args.expandable, "compile_eagerly": args.eager, "measured": args.measured}
    with (
        simulated_gpu(args.gpu or DEFAULT_GPU, vram=limit, **settings) as gpu,
        redirect_stdout(sys.stderr) if args.json else nullcontext(),
    ):
        status = run_script(args.script, args.arguments, gpu)
    called = " ".join([args.script.name, *args.arguments])
    return show_run(gpu, args, args.script.stem, called, text_to=sys.stderr) or (1 if status else 0)

"""Run a configuration and record where every MiB goes: measured on a GPU, or simulated without one.

examples:
  wanvram profile tests/configs/baseline.yaml                      whatever this machine has
  wanvram profile tests/configs/baseline.yaml --device simulated --gpu rtx4060
  wanvram profile a.yaml b.yaml -o profiler_logs                   one fresh process each
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from wanvram.cli.budget import add_budget_flags, planned
from wanvram.cli.common import add_device_flags, add_output_flags, finish, progress_printer
from wanvram.config import load_config
from wanvram.units import parse_bytes

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="+", type=Path, help="YAML configuration file")
    add_device_flags(parser)
    add_budget_flags(parser)
    add_output_flags(parser, default="profiler_logs/<name>")
    parser.add_argument("--weights", help="checkpoint directory, random or tiny; overrides the file")


def run(args: argparse.Namespace) -> int:
    if len(args.config) > 1:
        return _run_each(args)
    config = load_config(args.config[0])
    if args.device:
        config = replace(config, device=args.device)
    if args.gpu:
        config = replace(config, gpu=args.gpu)
    if args.weights:
        config = replace(config, weights=args.weights)
    if args.vram:
        config = replace(config, memory_limit_bytes=parse_bytes(args.vram))
    config = planned(config, args)
    directory = args.output or Path("profiler_logs") / config.name
    from wanvram.run.execute import Output, execute

    record = execute(config, Output(directory, args.force), progress_printer(args))
    return finish(record, args, directory)


def _run_each(args: argparse.Namespace) -> int:
    """Every configuration in a process of its own, so that none sees another's allocator; the worst exit code is returned."""
    worst = 0
    base = args.output or Path("profiler_logs")
    for path in args.config:
        config = load_config(path)
        command = [sys.executable, "-m", "wanvram", "profile", str(path), "-o", str(base / config.name)]
        for flag in ("device", "gpu", "weights", "vram", "vram_budget", "ram"):
            if getattr(args, flag):
                command += [f"--{flag}", str(getattr(args, flag))]
        command += ["--force"] if args.force else []
        command += ["--json"] if args.json else []
        worst = max(worst, subprocess.run(command, check=False).returncode)
    return worst

"""Predict the memory of a run without a GPU and without weights.

examples:
  wanvram estimate --task t2v-1.3B --size 832*480
  wanvram estimate --task t2v-14B --size 1280*720 --load_strategy full --gpu rtx4090 --vram 24GiB
  wanvram estimate --config profiler_logs/baseline/config.yaml --memory_viz baseline.pickle
  wanvram estimate --diffusers Wan-Diffusers --height 720 --width 1280 --num_frames 81 --offload model --gpu rtx4090
"""

from __future__ import annotations

import argparse
from pathlib import Path

from wanvram.cli.common import add_link_flag, add_output_flags, finish, memory_limit, run_printer
from wanvram.cli.diffusers_pipeline import add_pipeline_flags, check_no_pipeline, estimate_pipeline
from wanvram.cli.flags import add_request_flags, add_strategy_flags, config_from_flags
from wanvram.cli.processes import for_all
from wanvram.config import RunConfig
from wanvram.errors import InputError

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_request_flags(parser)
    add_strategy_flags(parser)
    card = "card to simulate: rtx4090, FILE.yaml (wanvram check --cards; default: h200, measured)"
    add("--gpu", metavar="CARD", help=card)
    add_link_flag(parser)
    add("--vram", help="memory the run may use, for example 8GiB; exit code 3 if it does not fit")
    add("--memory_viz", type=Path, metavar="FILE.pickle", help="also write what https://pytorch.org/memory_viz opens")
    add_output_flags(parser, default="nothing is written")
    add_pipeline_flags(parser)


def run(args: argparse.Namespace) -> int:
    if args.diffusers is not None:
        return estimate_pipeline(args)
    check_no_pipeline(args)
    limit = memory_limit(args)
    weights = None if args.config else "random"  # those of the file: tiny ones are of another size
    config = config_from_flags(args, device="simulated", weights=weights, gpu=args.gpu, memory_limit_bytes=limit)
    config = for_all(config)
    if args.memory_viz is not None:
        return _export(args, config)
    from wanvram.predict.simulate import run_or_simulate
    from wanvram.run.execute import Output

    record = run_or_simulate(config, Output(args.output, args.force, video=True, debug=args.debug), run_printer(args))
    return finish(record, args, args.output)


def _export(args: argparse.Namespace, config: RunConfig) -> int:
    """The run once more as an allocator snapshot; nothing else is written."""
    if args.output is not None:
        raise InputError("--memory_viz and -o: give one of them; a run directory has its timeline.json")
    if args.memory_viz.exists() and not args.force:
        raise InputError(f"--memory_viz {args.memory_viz} exists; give --force to replace it")
    from wanvram.predict.simulate import simulate
    from wanvram.report.memory_viz import export_timeline
    from wanvram.simulate.timeline import Timeline

    record, memory = simulate(config, video=True, timeline=True)
    assert isinstance(memory.observer, Timeline)
    export_timeline(args.memory_viz, memory.observer)
    return finish(record, args, None)

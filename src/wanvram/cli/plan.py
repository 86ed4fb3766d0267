"""Find the fastest way to run a request without loss in the memory there is, and say what it costs; no GPU needed.

examples:
  wanvram plan --task i2v-14B --size 480p                                          for the card in this machine
  wanvram plan --task t2v-14B --size 1280*720 --gpu rtx4060 --ram 32GiB            less a desktop's share of its memory
  wanvram plan --task t2v-1.3B --size 832*480 --vram 6GiB --gpu rtx4060 --json     of a card that is shared
  wanvram plan --task t2v-14B --vram auto -o plan.yaml && wanvram generate --config plan.yaml --ckpt_dir ./Wan2.1-T2V-14B
  wanvram plan --gpus 2 --gpu rtx4090 --link pcie4 --vram 12GiB --size 480p        two cards: how they share, and what each takes
  wanvram plan --longest --task t2v-14B --size 480p,720p --gpu rtx4080             the most frames that fit, for each size

Exit code 3 if nothing fits: then it names the smallest budget that would do, and sizes or frames that fit this one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from wanvram import knobs
from wanvram.cli.budget import budget_for, budget_of
from wanvram.cli.common import add_link_flag, progress_printer
from wanvram.cli.flags import add_knob_flags, add_request_flags, config_from_flags
from wanvram.command_line import generate_command
from wanvram.config import RunConfig
from wanvram.errors import BudgetError, InputError
from wanvram.planner.budget import Budget
from wanvram.planner.result import Refusal
from wanvram.record import write_atomically
from wanvram.report.plan import longest_table, summarize_plan
from wanvram.request import MAX_FRAMES
from wanvram.units import MIB, human

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add_request_flags(parser)
    group = parser.add_argument_group("budget")
    add = group.add_argument
    vram = "memory to plan for, of each GPU, for example 8GiB; auto: what the card here has free now (default: that, or with "
    add("--vram", help=vram + "--gpu that card's memory less a desktop's share)")
    ram = (
        "memory of the host, for example 32GiB; an eighth of it, at least 4 GiB, is kept for the system (default: this "
    )
    add("--ram", help=ram + "machine's; not limited for another machine's card)")
    add("--gpu", metavar="CARD", help="card to plan for, also FILE.yaml (default: the one in this machine)")
    add_link_flag(group)
    fixed = parser.add_argument_group("fixed, not chosen by the planner")
    add_knob_flags(fixed, knobs.asked())
    add = parser.add_argument
    add("--longest", action="store_true", help="find the most frames that fit (minutes); --size may name several")
    add("--ckpt_dir", "--weights", dest="weights", help="written into the command and -o (default: random)")
    add("-o", "--output", type=Path, help="YAML configuration for generate and profile")
    add("--force", action="store_true", help="replace the file that is already there")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def run(args: argparse.Namespace) -> int:
    if args.longest:
        return _longest(args)
    config = _config(args)
    if args.output is not None and args.output.exists() and not args.force:
        raise InputError(f"{args.output} exists; --force replaces it")
    budget = _budget(args, config)
    from wanvram.predict.plan import plan_run, planned_config

    result, _ = plan_run(config, budget, show=progress_printer(args))
    if isinstance(result, Refusal):
        if args.json:
            print(json.dumps(result.to_json(), ensure_ascii=False))
        raise BudgetError(result.message, result.commands)
    ready = planned_config(config, result)
    command = _command(ready)
    if args.json:
        print(json.dumps(result.to_json() | {"command": command}, ensure_ascii=False))
    else:
        print(summarize_plan(result, command), end="")
    if args.output is not None:
        # A run under the budget as a hard cap, on the device there is.
        said = f"planned for {human(result.budget.usable_bytes)} on {result.budget.card.name}"
        write_atomically(args.output, replace(ready, description=said).to_yaml())
        if not args.json:
            print(f"Wrote {args.output}")
    return 0


def _config(args: argparse.Namespace) -> RunConfig:
    return config_from_flags(args, device=None, weights=args.weights, gpu=args.gpu, memory_limit_bytes=None)


def _budget(args: argparse.Namespace, config: RunConfig) -> Budget:
    return budget_for(config, budget_of(args.vram, args.ram, config.gpu))


def _command(planned: RunConfig) -> str:
    """For the card that is there, with whole MiB of the budget as a cap."""
    limit = planned.memory_limit_bytes
    return generate_command(replace(planned, gpu=None, link=None, memory_limit_bytes=limit and limit // MIB * MIB))


def _longest(args: argparse.Namespace) -> int:
    """One row per size: the most frames that fit; exit code 3 if no size fits with the fewest."""
    if args.output is not None or args.frame_num is not None:
        raise InputError("--longest: finds --frame_num and writes no file; leave --frame_num and -o out")
    sizes = args.size.split(",") if args.size else [None]
    configs = [_config(argparse.Namespace(**{**vars(args), "size": size})) for size in sizes]
    budget = _budget(args, configs[0])
    from wanvram.predict.longest import plan_longest
    from wanvram.predict.plan import planned_config

    show = progress_printer(args)
    found = [(config, plan_longest(config, budget, show)) for config in configs]
    ready = [planned_config(replace(config, request=plan.request), plan) for config, plan in found if plan is not None]
    commands = {config.request.size: _command(config) for config in ready}
    if args.json:
        rows = [
            {
                "size": c.request.size,
                "frame_num": p.request.frame_num if p else None,
                "plan": p.to_json() if p else None,
                "command": commands.get(c.request.size),
            }
            for c, p in found
        ]
        print(json.dumps({"schema": 1, "fits": bool(commands), "longest": rows}, ensure_ascii=False))
    if not commands:
        raise BudgetError(
            f"{configs[0].request.task} fits {human(budget.usable_bytes)} at none of these sizes, however short"
        )
    if not args.json:
        r = configs[0].request
        print(
            f"{r.task}, {r.sample_steps} steps, the most frames that fit {human(budget.usable_bytes)} of {budget.card.name}\n"
        )
        print(longest_table([(c.request.size, p) for c, p in found], MAX_FRAMES))
        print("\n".join(["", "run it with:", *(f"  {command}" for command in commands.values())]))
    return 0

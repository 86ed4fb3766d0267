"""Find the fastest way to run a request without loss in the memory there is, and say what it costs; no GPU needed.

examples:
  wanvram plan --task t2v-14B --size 1280*720 --vram 8GiB --ram 32GiB
  wanvram plan --task t2v-1.3B --size 832*480 --vram 8GiB --gpu rtx4060 --json
  wanvram plan --task t2v-14B --vram auto -o plan.yaml && wanvram generate --config plan.yaml --ckpt_dir ./Wan2.1-T2V-14B

Exit code 3 if nothing fits: then it names the smallest budget that would do, and sizes or frames that fit this one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import yaml

from wanvram.cli.budget import budget_of
from wanvram.cli.common import progress_printer
from wanvram.cli.flags import add_request_flags, config_from_flags
from wanvram.config import RunConfig
from wanvram.errors import BudgetError, InputError
from wanvram.planner.result import Plan, Refusal
from wanvram.record import write_atomically
from wanvram.report.plan import summarize_plan
from wanvram.units import gib

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add_request_flags(parser)
    group = parser.add_argument_group("budget")
    group.add_argument("--vram", required=True, help="memory of the card, for example 8GiB; auto: what it has free now")
    group.add_argument("--ram", help="memory of the host, for example 16GiB (default: not limited)")
    group.add_argument(
        "--gpu",
        metavar="CARD",
        help="card to plan for, also FILE.yaml (default: the one here with --vram auto, else h200)",
    )
    fixed = parser.add_argument_group("fixed, not chosen by the planner")
    fixed.add_argument("--precision", choices=("fp16", "bf16", "fp32"), help="default: fp16")
    fixed.add_argument("--weight_storage", choices=("same", "fp8"), help="fp8: half the transformer's weights, lossy")
    fixed.add_argument("--vae_precision", choices=("fp32", "bf16", "fp16"), help="default: fp32; others are lossy")
    parser.add_argument("--ckpt_dir", "--weights", dest="weights", help="written into -o (default: random)")
    parser.add_argument("-o", "--output", type=Path, help="YAML configuration for generate and profile")
    parser.add_argument("--force", action="store_true", help="replace the file that is already there")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def run(args: argparse.Namespace) -> int:
    config = config_from_flags(args, device=None, weights=args.weights, gpu=args.gpu, memory_limit_bytes=None)
    if args.output is not None and args.output.exists() and not args.force:
        raise InputError(f"{args.output} exists; --force replaces it")
    budget = budget_of(args.vram, args.ram, config)
    from wanvram.run.planning import plan_run, planned_config

    result, _ = plan_run(config, budget, show=progress_printer(args))
    if args.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
    if isinstance(result, Refusal):
        raise BudgetError(result.message)
    if not args.json:
        print(summarize_plan(result), end="")
    if args.output is not None:
        write_atomically(args.output, _yaml(planned_config(config, result), result))
        if not args.json:
            print(f"Wrote {args.output}")
    return 0


def _yaml(planned: RunConfig, plan: Plan) -> str:
    """A run under the budget as a hard cap, on the device there is."""
    budget = plan.budget
    described = replace(planned, description=f"planned for {gib(budget.usable_bytes)} on {budget.card.name}")
    return yaml.safe_dump(described.to_dict(), allow_unicode=True, sort_keys=False)

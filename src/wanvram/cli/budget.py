"""`--vram_budget`: the planner chooses the strategy before the run, which then keeps to the budget as a hard cap."""

from __future__ import annotations

import argparse
import sys

from wanvram.config import RunConfig
from wanvram.errors import BudgetError, InputError
from wanvram.planner.budget import Budget
from wanvram.planner.result import Refusal
from wanvram.record import Predicted
from wanvram.report.plan import summarize_plan
from wanvram.simulate.gpus import DEFAULT_GPU, find_gpu
from wanvram.units import parse_bytes

__all__ = ["add_budget_flags", "budget_of", "planned"]


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget")
    group.add_argument(
        "--vram_budget", help="plan the fastest lossless strategy for this much, e.g. 8GiB; auto: what is free"
    )
    group.add_argument("--ram", help="memory of the host the plan may use (default: what is available)")


def budget_of(vram: str, ram: str | None, config: RunConfig) -> Budget:
    """Budget of `--vram`/`--vram_budget` and `--ram`. Raises InputError, or DeviceError for auto without a GPU."""
    ram_bytes = parse_bytes(ram) if ram else None
    if vram.strip().lower() != "auto":
        return Budget(parse_bytes(vram), ram_bytes=ram_bytes, gpu=config.gpu or DEFAULT_GPU)
    from wanvram.run.environment import free_device_bytes

    free, total, name = free_device_bytes()
    return Budget(free, ram_bytes=ram_bytes, gpu=config.gpu or find_gpu(name, total).key)


def planned(config: RunConfig, args: argparse.Namespace) -> tuple[RunConfig, Predicted | None]:
    """The configuration with the planner's strategy under `--vram_budget` and what it will take; as it is without that flag.

    Raises BudgetError, exit code 3, if nothing fits.
    """
    if args.vram_budget is None:
        if args.ram is not None:
            raise InputError("--ram: limits what --vram_budget plans; give that, too")
        return config, None
    if args.vram:
        raise InputError("--vram_budget and --vram: give one of them; the budget is the limit, too")
    from wanvram.recorder.meters import available_ram_bytes
    from wanvram.run.environment import free_device_bytes, gpu_here
    from wanvram.run.host import since_process_start
    from wanvram.run.planning import plan_run, planned_config

    if config.gpu is None and config.device in ("auto", "cuda"):
        here = gpu_here()
        gpu = find_gpu(here, free_device_bytes()[1]).key if here else DEFAULT_GPU
    else:
        gpu = config.gpu or DEFAULT_GPU
    ram = args.ram or str(available_ram_bytes())
    budget = budget_of(args.vram_budget, ram, RunConfig(**{**vars(config), "gpu": gpu}))
    result, record = plan_run(config, budget, offers=False)
    if isinstance(result, Refusal):
        raise BudgetError(result.message)
    print(summarize_plan(result), file=sys.stderr)
    return planned_config(config, result), None if record is None else record.prediction(since_process_start())

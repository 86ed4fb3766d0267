"""Budgets of flags, and `--vram_budget`: the planner chooses the strategy before the run, which keeps to the budget as a hard cap."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace

from wanvram.cli.common import progress_printer, stated
from wanvram.command_line import generate_command
from wanvram.config import RunConfig
from wanvram.errors import BudgetError, DeviceError, InputError
from wanvram.knobs import PARALLEL_DEGREE, SIZES, Change, gpus
from wanvram.machine.nvml import first_gpu
from wanvram.planner.budget import Budget, desktop_bytes, system_ram
from wanvram.planner.result import Refusal
from wanvram.record import Predicted
from wanvram.report.plan import summarize_plan
from wanvram.simulate.gpus import DEFAULT_GPU, GPU, cards_with_memory, find_gpu
from wanvram.units import human

__all__ = ["add_budget_flags", "budget_for", "budget_of", "planned"]


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("budget").add_argument
    add("--vram_budget", help="plan the fastest lossless strategy for this much, e.g. 8GiB; auto: what is free")
    ram = "memory of the host, of which an eighth and at least 4 GiB are kept free (default: this machine's)"
    add("--ram", help=ram)


@dataclass(frozen=True)
class _Here:
    """The first visible card of this machine, by NVML: asking CUDA would create its context."""

    card: GPU
    free_bytes: int
    total_bytes: int


def budget_of(vram: str | None, ram: str | None, gpu: str | None, *, flag: str = "vram", now: bool = False) -> Budget:
    """Budget of `--vram` (or `--vram_budget`), `--ram` and `--gpu`, each of which may be absent.

    now: the run follows, so that RAM in use counts as taken. Raises InputError, also where neither --gpu nor this machine has
    a card, and DeviceError for auto without a GPU.
    """
    auto = vram is not None and vram.strip().lower() == "auto"
    vram_bytes = None if vram is None or auto else stated(flag, vram)
    ram_bytes = None if ram is None else stated("ram", ram)
    named = None if gpu is None else find_gpu(gpu)
    here = _here(required=auto)
    notes: list[str] = []
    card = named or (here.card if here else None)
    if card is None:
        raise InputError(_which_card(vram_bytes))
    if vram_bytes is None and here is not None and (auto or named is None):
        vram_bytes, now = here.free_bytes, True
        notes.append(f"{human(here.free_bytes)} of the {human(here.total_bytes)} of the {here.card.name} are free now")
    elif vram_bytes is None:
        left = desktop_bytes(card)
        vram_bytes = card.total_bytes - left
        notes.append(
            f"of the {human(card.total_bytes)} that the {card.name} offers, {human(left)} are left to others, as to a desktop"
        )
    budget = Budget(vram_bytes, ram_bytes=ram_bytes, gpu=card.argument, notes=tuple(notes))
    return _with_ram(budget, now) if ram_bytes is None and here is not None and here.card == card else budget


def budget_for(config: RunConfig, budget: Budget) -> Budget:
    """Of each GPU that the configuration asks for, and what joins them."""
    return replace(budget, gpus=gpus(config.strategy), link=config.link)


def _here(*, required: bool) -> _Here | None:
    """None without a card; DeviceError if one is required."""
    try:
        gpu = first_gpu()
    except DeviceError:
        if required:
            raise
        return None
    free, total = gpu.memory()
    return _Here(find_gpu(gpu.name, total), free, total)


def _with_ram(budget: Budget, now: bool) -> Budget:
    """With the RAM of this machine or container; what is in use is not ours if the run is to begin now."""
    from wanvram.machine.host import available_ram_bytes, total_ram_bytes

    total = total_ram_bytes()
    used = total - available_ram_bytes() if now else 0
    return replace(budget, ram_bytes=total, system_bytes=max(system_ram(total), used))


def _which_card(vram_bytes: int | None) -> str:
    cards = [] if vram_bytes is None else cards_with_memory(vram_bytes)
    with_it = f"cards with {human(vram_bytes or 0)}: {', '.join(cards)}"
    known = with_it if cards else "`wanvram check --cards` lists them"
    return f"no NVIDIA GPU answers here, and how long a run takes depends on the card: name it with --gpu ({known})"


def _with_free_sizes(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """Where `--gpus` says how many there are and nobody said how they share, the planner chooses that, too."""
    said = args.config is not None or any(vars(args).get(knob.name) is not None for knob in SIZES)
    if said or not PARALLEL_DEGREE.differs(config.strategy):
        return config
    return replace(config, strategy=Change(dict.fromkeys(SIZES, 1)).on(config.strategy))


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
    real = config.device in ("auto", "cuda")
    default = None if real else DEFAULT_GPU
    budget = budget_of(args.vram_budget, args.ram, config.gpu or default, flag="vram_budget", now=real)
    if config.gpu is None and default is not None:
        note = f"planned for the {budget.card.name}, the card that is simulated where --gpu names none"
        budget = replace(budget, notes=(*budget.notes, note))
    budget, config = budget_for(config, budget), _with_free_sizes(config, args)
    from wanvram.machine.host import since_process_start
    from wanvram.predict.plan import plan_run, planned_config

    result, record = plan_run(config, budget, offers=False, show=progress_printer(args))
    if isinstance(result, Refusal):
        raise BudgetError(result.message, result.commands)
    ready = planned_config(config, result)
    print(summarize_plan(result, generate_command(ready)), file=sys.stderr)
    return ready, None if record is None else record.prediction(since_process_start())

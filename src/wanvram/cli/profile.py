"""Run configurations and record where every MiB goes: measured on a GPU, or simulated without one.

examples:
  wanvram profile tests/configs/baseline.yaml                      whatever this machine has
  wanvram profile tests/configs/baseline.yaml --device simulated --gpu rtx4060 --live
  wanvram profile tests/configs/*.yaml -o profiler_logs            one fresh process each, into profiler_logs/<name>
  wanvram profile tests/configs/matrix.yaml --timeout 600          every combination of the file's axes

Of several configurations only those without a result are run, so an interrupted series goes on where it was; one whose
configuration was edited since is left alone and named at the end, and --force_changed replaces it. A run out of memory and a failed
run are results, too. The exit code is the highest of all: 0 ok, 1 a run failed, 3 one does not fit; 2 if one was left alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanvram.advice import write_advice
from wanvram.cli import streams
from wanvram.cli.budget import add_budget_flags, planned
from wanvram.cli.common import (
    add_device_flags,
    add_output_flags,
    finish,
    memory_limit,
    progress_printer,
    run_printer,
    settle_allocator,
)
from wanvram.cli.flags import add_knob_flags, of_gpus
from wanvram.cli.processes import decided, for_all, must_start, processes
from wanvram.config import RunConfig
from wanvram.errors import InputError, WanvramError
from wanvram.knobs import PARALLEL_DEGREE
from wanvram.machine.launched import launched
from wanvram.matrix.grid import is_matrix, load_configurations
from wanvram.matrix.jobs import Job, difference, differing, exit_code
from wanvram.matrix.progress import display
from wanvram.matrix.runner import Outcome, die_with_parent, run_all
from wanvram.record import RunRecord
from wanvram.report.compare import runs_table
from wanvram.simulate.gpus import find_gpu
from wanvram.strict_yaml import MAX_BYTES, MAX_WRITTEN_BYTES

if TYPE_CHECKING:
    from wanvram.run.execute import Output

__all__ = ["prepare_parser", "run"]

LOGS = Path("profiler_logs")

Changed = tuple[Job, list[str]]  # left alone, and the dotted keys in which it differs


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", nargs="+", type=Path, help="YAML configuration or matrix file")
    add_device_flags(parser)
    add_knob_flags(parser.add_argument_group("several GPUs"), (PARALLEL_DEGREE,))
    add_budget_flags(parser)
    add_output_flags(parser, default="profiler_logs/<name>; of several the folder above, profiler_logs")
    add("--weights", help="checkpoint directory, random or tiny; overrides the file")
    add("--timeout", type=_seconds, metavar="SECONDS", help="stop a run that takes longer, go on")
    add("--retry", action="store_true", help="of several, run those that failed (not: out of memory) again")
    changed = "of several, replace the runs whose configuration has changed since"
    add("--force_changed", "--force-changed", action="store_true", help=changed)
    add("--live", action="store_true", help="show stages, memory and time left while it runs")
    add("--advice", action="store_true", help="simulate which changes lower the peak most (advice.json)")
    add("--child_of", type=int, help=argparse.SUPPRESS)  # the process of a series this one belongs to


def run(args: argparse.Namespace) -> int:
    limit = MAX_BYTES if args.child_of is None else MAX_WRITTEN_BYTES
    configs = [
        for_all(_overridden(config, args), to_be_planned=args.vram_budget is not None)
        for config in load_configurations(args.config, limit)
    ]
    single = len(args.config) == 1 and not is_matrix(args.config[0], limit)
    if not single or args.timeout is not None:
        return _run_each(configs, args, single)
    for flag in ("retry", "force_changed"):
        if getattr(args, flag):
            raise InputError(f"--{flag} is for several configurations; a single one is run again with --force")
    return _run_here(configs[0], args)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return value


def _overridden(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """With what the flags say instead of the file."""
    changes = {key: getattr(args, key) for key in ("device", "gpu", "link", "weights") if getattr(args, key)}
    config = replace(config, **changes)
    if args.vram:
        config = replace(config, memory_limit_bytes=memory_limit(args))
    if args.parallel_degree is not None:
        strategy = replace(config.strategy, **of_gpus({PARALLEL_DEGREE.name: args.parallel_degree}))
        config = replace(config, strategy=strategy)
    return config


def _run_here(config: RunConfig, args: argparse.Namespace) -> int:
    if args.child_of is not None and not launched().is_one_of_several:
        die_with_parent(args.child_of)
    _look_at_checkpoint(config)
    if must_start(config):
        from wanvram.run.launch import start

        return start(config, args.words)
    settle_allocator(config, to_be_planned=args.vram_budget is not None)
    with processes() as world:
        directory = args.output or LOGS / config.name
        config, predicted, directory = decided(world, lambda: (*planned(config, args), directory))
        from wanvram.run.execute import Output

        output = Output(directory, args.force, predicted=predicted, debug=args.debug, world=world)
        record = _recorded(config, output, args)
        if args.advice and launched().is_first:
            _advise(directory, config, record, args)
        return exit_code(record) if args.child_of is not None else finish(record, args, directory)


def _recorded(config: RunConfig, output: Output, args: argparse.Namespace) -> RunRecord:
    from wanvram.predict.simulate import run_or_simulate

    if not args.live or not launched().is_first:
        return run_or_simulate(config, output, run_printer(args))
    from wanvram.report.live import LiveView

    view = LiveView(config.name, config.memory_limit_bytes)
    return run_or_simulate(config, output, view.told, view.watch)


def _look_at_checkpoint(config: RunConfig) -> None:
    """Before a plan, which takes up to a minute. The simulated device reads no checkpoint, so there it may be missing."""
    from wanvram.run.execute import device_kind
    from wanvram.run.weights import check_weights

    if device_kind(config) != "simulated":
        check_weights(config.weights, config.request.task)


def _advise(directory: Path, config: RunConfig, record: RunRecord, args: argparse.Namespace) -> None:
    """The run is recorded already: advice that cannot be given is said and changes nothing."""
    from wanvram.predict.advice import advise

    try:
        write_advice(directory, advise(config, record, show=progress_printer(args)))
    except WanvramError as error:
        streams.say(f"no advice: {error}")


def _run_each(configs: Sequence[RunConfig], args: argparse.Namespace, single: bool) -> int:
    """Every configuration in a process of its own; the highest exit code is returned."""
    if args.advice:
        raise InputError(
            "--advice is for one run; of several, use `wanvram analyze RUN --advice` on the one in question"
        )
    if args.live:
        raise InputError("--live shows one run; give one configuration, without --timeout")
    if args.vram and args.vram_budget:
        raise InputError("--vram_budget and --vram: give one of them; the budget is the limit, too")
    base = args.output or LOGS
    jobs = _jobs(configs, args, base, single)
    # Found before the first run, so that who watches can stop a series of hours at once.
    untouched = not (single or args.force or args.force_changed)
    found = [(job, difference(job) if untouched else []) for job in jobs]
    changed = [(job, keys) for job, keys in found if keys]
    for job, keys in changed:
        streams.say(f"{job.directory}: {_left_alone(keys)}")
    again = {name: getattr(args, name) for name in ("force", "force_changed", "retry")}
    with display(quiet=args.json) as shown:
        outcomes = run_all([job for job, keys in found if not keys], shown, timeout=args.timeout, **again)
    code = 2 if changed else max(outcome.exit_code for outcome in outcomes)  # 2: not all that was asked for was done
    if args.json:
        print(json.dumps(_document(base, outcomes, changed, code), ensure_ascii=False))
    else:
        _summarize(base, outcomes, changed)
    return code


def _jobs(configs: Sequence[RunConfig], args: argparse.Namespace, base: Path, single: bool) -> list[Job]:
    for config in configs:
        if config.gpu is not None:
            find_gpu(config.gpu)
    jobs = [Job(c, base / c.name, args.vram_budget, args.ram) for c in configs]
    return [replace(jobs[0], directory=args.output)] if single and args.output is not None else jobs


def _left_alone(keys: Sequence[str]) -> str:
    return f"changed: not run ({differing(keys)}); --force_changed replaces it"


def _summarize(base: Path, outcomes: Sequence[Outcome], changed: Sequence[Changed]) -> None:
    if outcomes:
        print(runs_table([(o.job.name, o.record) for o in outcomes]) + "\n")
    for job, keys in changed:
        print(f"{job.name}: {_left_alone(keys)}")
    ran = sum(outcome.seconds is not None for outcome in outcomes)
    counts = f"{ran} run, {len(outcomes) - ran} already done" + (f", {len(changed)} changed" if changed else "")
    print(f"{counts}; `wanvram report {base}` shows them side by side")


def _document(base: Path, outcomes: Sequence[Outcome], changed: Sequence[Changed], code: int) -> dict[str, object]:
    return {
        "schema": 1,
        "directory": str(base),
        "exit_code": code,
        "runs": [
            {
                "name": outcome.job.name,
                "directory": str(outcome.job.directory),
                "kept": outcome.seconds is None,
                "seconds": outcome.seconds,
                "exit_code": outcome.exit_code,
                "record": outcome.record.to_json(),
            }
            for outcome in outcomes
        ],
        "changed": [{"name": job.name, "directory": str(job.directory), "differs": keys} for job, keys in changed],
    }

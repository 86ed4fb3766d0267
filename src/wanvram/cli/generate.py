"""Generate videos or pictures from text, pictures or videos, with little memory.

examples:
  wanvram generate --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "a cat on a skateboard"
  wanvram generate --task i2v-14B --size 832*480 --ckpt_dir ./Wan2.1-I2V-14B-480P --image cat.jpg --prompt "the cat jumps"
  wanvram generate --task flf2v-14B --ckpt_dir ./Wan2.1-FLF2V-14B-720P --first_frame a.png --last_frame b.png --prompt "..."
  wanvram generate --task vace-1.3B --size 832*480 --ckpt_dir ./Wan2.1-VACE-1.3B --src_ref_images cat.png,hat.png --prompt "..."
  wanvram generate --config run.yaml --prompt_file prompts.txt                     several prompts, models loaded once
  wanvram generate --resume videos/RUN             an interrupted run goes on, also as --resume videos/RUN --vram_budget 8GiB
  wanvram generate --weights tiny --prompt "a cat"       a first try on the CPU, in seconds: a small video of noise
  wanvram generate --weights tiny --prompt "a cat" --gpus 2      two GPUs make it together (tiny weights: two processes on the CPU)
  wanvram generate --weights random --task t2v-1.3B --size 832*480        full size without a download: noise, real memory

Needs an NVIDIA GPU, except with tiny weights, which make videos of any size in multiples of 16 (default: 9 frames of 128*80,
4 steps of t2v-1.3B). Without a GPU nothing is generated and the exit code is 1; `wanvram estimate`
predicts memory and time anywhere, and --device simulated shows what would be done here.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanvram.cli.budget import add_budget_flags, planned
from wanvram.cli.common import add_device_flags, add_output_flags, finish, memory_limit, run_printer, settle_allocator
from wanvram.cli.flags import add_request_flags, add_strategy_flags, config_from_flags
from wanvram.cli.processes import Decision, decided, for_all, must_start, processes
from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.knobs import gpus
from wanvram.machine.launched import launched
from wanvram.tasks import TASKS
from wanvram.weights.folder import GENERATED, existing_path

if TYPE_CHECKING:
    from wanvram.run.resume import Resumption

__all__ = ["prepare_parser", "run"]

# Tiny weights are for a first try on a CPU, in seconds: 2 cores take 30 s for 5 frames of 832*480, 3 s for 9 of this size.
TINY_DEFAULTS: dict[str, Any] = {"task": "t2v-1.3B", "size": "128*80", "frame_num": 9, "sample_steps": 4}


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_request_flags(parser)
    add_strategy_flags(parser)
    add_device_flags(parser)
    add_budget_flags(parser)
    add("--ckpt_dir", "--weights", dest="weights", help="official checkpoint directory, random or tiny")
    add("--save_file", type=Path, help="the video's (or picture's) file (default: in the run directory)")
    add_output_flags(parser, default="videos/<task>-<size>-<frames>-seed<seed>, with -2, -3, ... when that is taken")
    add = parser.add_argument_group("long runs").add_argument
    keep = "steps after which latents are kept to go on from (default: about every two minutes; 0: never)"
    add("--keep_every", type=int, metavar="N", help=keep)
    resume = "go on with an interrupted run: the same video, with any lossless strategy of the flags beside it"
    add("--resume", type=Path, metavar="RUN_DIR", help=resume)


def run(args: argparse.Namespace) -> int:
    with _resumption(args) as resumption:
        config = for_all(_config(args, resumption), to_be_planned=args.vram_budget is not None)
        _check(config, args)
        if not must_start(config):
            return _generate(config, args, resumption)
    from wanvram.run.launch import start

    return start(config, args.words)


@contextmanager
def _resumption(args: argparse.Namespace) -> Iterator[Resumption | None]:
    if args.resume is None:
        yield None
        return
    for flag in ("config", "output", "save_file", "force"):
        if getattr(args, flag):
            raise InputError(f"--{flag}: the run of --resume has its own; leave it out")
    from wanvram.run.resume import interrupted_run

    with interrupted_run(args.resume, hold=launched().is_first) as resumption:
        yield resumption


def _check(config: RunConfig, args: argparse.Namespace) -> None:
    """What can be seen before anything is planned, started or written; what costs the user most to mend comes first."""
    if config.weights not in GENERATED and config.device != "simulated":
        existing_path(config.weights)  # without torch
    if gpus(config.strategy) == 1 or launched().is_one_of_several:  # the process that starts others never computes
        settle_allocator(config, to_be_planned=args.vram_budget is not None)
    _refuse_what_cannot_run(config)
    if config.weights == "tiny" and args.vram_budget is not None:
        raise InputError("--vram_budget: a plan is of full-size models; tiny weights take some MiB, so leave it out")


def _generate(config: RunConfig, args: argparse.Namespace, resumption: Resumption | None) -> int:
    with processes() as world:
        if resumption is not None and launched().is_first:
            print(resumption.outlook(), file=sys.stderr)
        config, predicted, directory = decided(world, lambda: _decide(config, args, resumption))
        from wanvram.predict.simulate import run_or_simulate
        from wanvram.run.execute import Output
        from wanvram.run.outputs import files_of

        save_file = resumption.save_file if resumption else args.save_file
        output = Output(
            directory, args.force, True, save_file, predicted, debug=args.debug, resume=resumption, world=world
        )
        record = run_or_simulate(config, output, run_printer(args))
        videos = (
            [] if save_file is None else [p for p in files_of(config, save_file) if p.with_suffix(".json").is_file()]
        )
        code = finish(record, args, directory, videos)
    if record.simulated:
        stream = sys.stderr if args.json else sys.stdout
        print("Nothing was generated: the device is simulated, which computes sizes and no pixels.", file=stream)
    elif record.failure is not None and launched().is_first:
        print(f"wanvram generate --resume {shlex.quote(str(directory))} goes on with it", file=sys.stderr)
    return code


def _decide(config: RunConfig, args: argparse.Namespace, resumption: Resumption | None) -> Decision:
    """Seed, strategy and place of the run, where the user left them open."""
    if config.request.base_seed < 0:
        import secrets

        config = replace(config, request=replace(config.request, base_seed=secrets.randbelow(2**31)))
    config, predicted = planned(config, args)
    if resumption is not None and predicted is not None:
        predicted = replace(predicted, seconds=None)  # of the whole run
    from wanvram.run.directory import unused_directory

    usual = Path("videos") / f"{config.name}-seed{config.request.base_seed}"
    return config, predicted, args.resume or args.output or unused_directory(usual)


def _config(args: argparse.Namespace, resumption: Resumption | None) -> RunConfig:
    config = _of_flags(args, resumption.config if resumption else None)
    if args.keep_every is not None:
        try:
            config = replace(config, measurement=replace(config.measurement, keep_every=args.keep_every))
        except InputError as error:
            raise InputError(f"--{error}") from error
    if resumption is not None:
        from wanvram.run.resume import asked, refuse_difference

        refuse_difference(resumption.directory, asked(resumption.config), asked(config))
    return config


def _of_flags(args: argparse.Namespace, base: RunConfig | None) -> RunConfig:
    """Tiny weights run on the CPU unless something else is asked for. base: of the run that goes on."""
    if base is None and args.config is None:
        if not args.weights:
            raise InputError("--ckpt_dir is required: a checkpoint directory, or random or tiny for generated weights")
        if args.weights == "tiny":
            _make_small(args)
    tiny = base is None and args.weights == "tiny"
    given = {"weights": args.weights, "gpu": args.gpu, "memory_limit_bytes": memory_limit(args), "base": base}
    config = config_from_flags(args, device=args.device or ("cpu" if tiny else None), **given)
    on_cpu = base is None and (config.device, config.weights) == ("auto", "tiny")
    return replace(config, device="cpu") if on_cpu else config


def _make_small(args: argparse.Namespace) -> None:
    """What was not given is that of a first try."""
    one_picture = TASKS[args.task or TINY_DEFAULTS["task"]].frames == 1
    for name, value in (TINY_DEFAULTS | ({"frame_num": 1} if one_picture else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _refuse_what_cannot_run(config: RunConfig) -> None:
    """Before anything is planned or written: the checkpoint, then the GPU."""
    if config.device == "simulated":
        return
    from wanvram.run.weights import check_weights

    check_weights(config.weights, config.request.task)
    if config.device in ("auto", "cuda"):
        from wanvram.machine.usable_gpu import require_gpu

        require_gpu("nothing was generated")

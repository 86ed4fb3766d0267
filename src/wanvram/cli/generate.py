"""Generate videos or pictures from text, pictures or videos, with little memory.

examples:
  wanvram generate --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "a cat on a skateboard"
  wanvram generate --task i2v-14B --size 832*480 --ckpt_dir ./Wan2.1-I2V-14B-480P --image cat.jpg --prompt "the cat jumps"
  wanvram generate --task flf2v-14B --ckpt_dir ./Wan2.1-FLF2V-14B-720P --first_frame a.png --last_frame b.png --prompt "..."
  wanvram generate --task vace-1.3B --size 832*480 --ckpt_dir ./Wan2.1-VACE-1.3B --src_ref_images cat.png,hat.png --prompt "..."
  wanvram generate --config run.yaml --prompt_file prompts.txt                     several prompts, models loaded once
  wanvram generate --weights tiny --device cpu --task t2v-1.3B --size 832*480 --frame_num 5 --sample_steps 2
  wanvram generate --weights random --task t2v-1.3B --size 832*480        full size without a download: noise, real memory
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from wanvram.cli.budget import add_budget_flags, planned
from wanvram.cli.common import (
    add_device_flags,
    add_output_flags,
    finish,
    memory_limit,
    progress_printer,
    settle_allocator,
)
from wanvram.cli.flags import add_request_flags, add_strategy_flags, config_from_flags
from wanvram.errors import InputError

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add_request_flags(parser)
    add_strategy_flags(parser)
    add_device_flags(parser)
    add_budget_flags(parser)
    parser.add_argument("--ckpt_dir", "--weights", dest="weights", help="official checkpoint directory, random or tiny")
    parser.add_argument(
        "--save_file", type=Path, help="the video's (or picture's) file (default: in the run directory)"
    )
    add_output_flags(parser, default="videos/<task>-<size>-<frames>-seed<seed>, with -2, -3, ... when that is taken")


def run(args: argparse.Namespace) -> int:
    if not args.weights and args.config is None:
        raise InputError("--ckpt_dir is required: a checkpoint directory, or random or tiny for generated weights")
    device = args.device or ("cpu" if args.weights == "tiny" else None)
    limit = memory_limit(args)
    config = config_from_flags(args, device=device, weights=args.weights, gpu=args.gpu, memory_limit_bytes=limit)
    if config.request.base_seed < 0:
        import secrets

        config = replace(config, request=replace(config.request, base_seed=secrets.randbelow(2**31)))
    config, predicted = planned(config, args)
    settle_allocator(config)
    from wanvram.run.directory import unused_directory
    from wanvram.run.execute import Output, execute

    directory = args.output or unused_directory(Path("videos") / f"{config.name}-seed{config.request.base_seed}")
    output = Output(directory, args.force, video=True, save_file=args.save_file, predicted=predicted)
    record = execute(config, output, progress_printer(args))
    return finish(record, args, directory)

"""Generate a video from text, with little memory.

examples:
  wanvram generate --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "a cat on a skateboard"
  wanvram generate --weights tiny --device cpu --task t2v-1.3B --size 832*480 --frame_num 5 --sample_steps 2
  wanvram generate --weights random --task t2v-1.3B --size 832*480        full size without a download: noise, real memory
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from wanvram.cli.common import add_device_flags, add_output_flags, finish, progress_printer
from wanvram.cli.flags import add_request_flags, add_strategy_flags, config_from_flags
from wanvram.errors import InputError
from wanvram.units import parse_bytes

__all__ = ["prepare_parser", "run"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add_request_flags(parser)
    add_strategy_flags(parser)
    add_device_flags(parser)
    parser.add_argument("--ckpt_dir", "--weights", dest="weights", help="official checkpoint directory, random or tiny")
    add_output_flags(parser, default="videos/<task>-<size>-<frames>-seed<seed>")


def run(args: argparse.Namespace) -> int:
    if not args.weights:
        raise InputError("--ckpt_dir is required: a checkpoint directory, or random or tiny for generated weights")
    device = args.device or ("cpu" if args.weights == "tiny" else "auto")
    limit = parse_bytes(args.vram) if args.vram else None
    config = config_from_flags(args, device=device, weights=args.weights, gpu=args.gpu, memory_limit_bytes=limit)
    if config.request.base_seed < 0:
        import secrets

        config = replace(config, request=replace(config.request, base_seed=secrets.randbelow(2**31)))
    directory = args.output or Path("videos") / f"{config.name}-seed{config.request.base_seed}"
    from wanvram.run.execute import Output, execute

    record = execute(config, Output(directory, args.force, video=True), progress_printer(args))
    return finish(record, args, directory)

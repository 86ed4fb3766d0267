"""`wanvram estimate --diffusers DIR`: any pipeline of diffusers from its configurations, simulated as anybody's code is."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from wanvram.cli.common import memory_limit
from wanvram.cli.simulated_run import add_measured_flag, check_output, show_run
from wanvram.command_line import flag_of
from wanvram.errors import InputError

__all__ = ["add_pipeline_flags", "check_no_pipeline", "estimate_pipeline"]

# Destination -> flag: `offload` is that of --offload_model.
_OWN = {name: name for name in ("height", "width", "num_frames", "dtype", "vae_dtype", "measured")}
_OWN["pipeline_offload"] = "offload"
_SHARED = ("diffusers", "verb", "run", "words", "gpu", "vram", "output", "force", "json", "debug")
MOST_PIXELS, MOST_FRAMES = 16_384, 4096  # of a side; larger is a mistake, and a card has not the memory


def add_pipeline_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a diffusers pipeline, of any model (docs/your-own-code.md)")
    add = group.add_argument
    add("--diffusers", type=Path, metavar="DIR", help="folder with model_index.json and config.json; no weights needed")
    add("--height", type=int, help="pixels (default: the pipeline's)")
    add("--width", type=int, help="pixels (default: the pipeline's)")
    add("--num_frames", type=int, help="of a video (default: the pipeline's)")
    ways = ("none", "model", "sequential", "group")
    add("--offload", dest="pipeline_offload", choices=ways, help="diffusers' offloading (default: none)")
    add_measured_flag(group)
    for flag, what in (("--dtype", "the models (default: bf16)"), ("--vae_dtype", "the VAE (default: as --dtype)")):
        add(flag, choices=("bf16", "fp16", "fp32"), help=f"of {what}")


def check_no_pipeline(args: argparse.Namespace) -> None:
    """Raises InputError for a flag that only --diffusers knows."""
    for name, flag in _OWN.items():
        if vars(args)[name] is not None:
            raise InputError(f"--{flag} belongs to --diffusers DIR, which is missing")


def estimate_pipeline(args: argparse.Namespace) -> int:
    """0, or 3 if it does not fit the card. Raises InputError that names what cannot be built."""
    given = {name: value for name, value in vars(args).items() if value not in (None, False)}
    for name in given:
        if name not in (*_OWN, *_SHARED):
            known = ", --".join(_OWN.values())
            raise InputError(f"{flag_of(name)} says nothing about --diffusers; its flags are --{known}")
    for name, most in (("height", MOST_PIXELS), ("width", MOST_PIXELS), ("num_frames", MOST_FRAMES)):
        if vars(args)[name] is not None and not 1 <= vars(args)[name] <= most:
            raise InputError(f"--{name}: {vars(args)[name]} is outside 1..{most}")
    check_output(args)
    limit = memory_limit(args)
    from wanvram.foreign.pipeline_folder import read_pipeline_folder
    from wanvram.foreign.pipeline_run import PipelineCall, run_pipeline
    from wanvram.foreign.session import simulated_gpu
    from wanvram.simulate.gpus import DEFAULT_GPU

    folder = read_pipeline_folder(args.diffusers)
    dtype = args.dtype or "bf16"
    size = (args.height, args.width, args.num_frames)
    call = PipelineCall(*size, args.pipeline_offload or "none", dtype, args.vae_dtype or dtype)
    card = simulated_gpu(args.gpu or DEFAULT_GPU, vram=limit, measured=args.measured)
    with redirect_stdout(sys.stderr), card as gpu:
        run_pipeline(folder, call, gpu)
    flags = [f"--{flag} {vars(args)[name]}" for name, flag in _OWN.items() if vars(args)[name] is not None]
    return show_run(gpu, args, folder.kind, " ".join(["--diffusers", folder.path.name, *flags]))

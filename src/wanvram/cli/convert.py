"""Rewrite a checkpoint in the precision it is run in, one file per block; interrupted runs continue.

examples:
  wanvram convert Wan2.1-T2V-1.3B --precision bf16 -o Wan2.1-T2V-1.3B-bf16
  wanvram convert Wan2.1-I2V-14B-480P-Diffusers --precision fp8 -o i2v-fp8 --task i2v-14B
  wanvram convert Wan2.1-T2V-14B --precision fp16 --components dit,vae -o t2v-fp16 --verify

CKPT is an official download, a Diffusers folder or one of ComfyUI's single files. fp8 is lossy: the matrices of the transformer's
blocks in float8_e4m3fn with one scale per row; the manifest, wanvram.json, states the largest error.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from wanvram.cli.common import progress_printer
from wanvram.foreign_text import shown
from wanvram.tasks import TASKS
from wanvram.units import human

__all__ = ["prepare_parser", "run"]

COMPONENTS = ("text_encoder", "image_encoder", "dit", "vae")


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="checkpoint folder, official or Diffusers")
    add("--precision", choices=("bf16", "fp16", "fp8"), required=True, help="what the dit is stored in")
    add("-o", "--output", type=Path, required=True, help="new folder, or the one of an interrupted run")
    add("--task", choices=tuple(TASKS), help="what the checkpoint must be for (default: recognised)")
    add("--components", type=_components, help=f"some of {','.join(COMPONENTS)} (default: as needed)")
    add("--fp8_text_encoder", action="store_true", help="with fp8: the text encoder's matrices too")
    add("--verify", action="store_true", help="read every file of the result again, compare its hash")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def _components(text: str) -> tuple[str, ...]:
    names = text.split(",")
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no component '{unknown[0]}'; there are {', '.join(COMPONENTS)}")
    return tuple(name for name in COMPONENTS if name in names)


def run(args: argparse.Namespace) -> int:
    from wanvram.errors import InputError
    from wanvram.weights.convert import Conversion, convert, verify

    if args.fp8_text_encoder and args.precision != "fp8":
        raise InputError(f"--fp8_text_encoder has no effect with --precision {args.precision}; it goes with fp8")
    dit = TASKS[args.task].dit if args.task else None
    job = Conversion(args.checkpoint, args.precision, dit, args.components, args.fp8_text_encoder)
    progress = progress_printer(args)
    manifest = convert(job, args.output, progress=progress)
    verified = verify(args.output, manifest, progress) if args.verify else None
    if args.json:
        print(json.dumps({"output": str(args.output), "verified_files": verified, **manifest}))
        return 0
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{len(manifest['files'])} files, {human(size)}: " + ", ".join(manifest["models"].values()))
    if "fp8" in manifest:
        worst = manifest["fp8"]["max_error_of_row_maximum"]
        print(f"fp8: no weight is off by more than {worst:.2%} of the largest in its row")
    print(f"Wrote {shown(args.output)}")
    return 0

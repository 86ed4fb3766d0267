"""The official script's flags (spec section 7: same names, same defaults) and how they become a RunConfig."""

from __future__ import annotations

import argparse

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.tasks import TASKS

__all__ = ["add_request_flags", "add_strategy_flags", "boolean", "config_from_flags"]

UNSUPPORTED_TASKS_REASON = "only text to video (t2v-1.3B, t2v-14B) and text to image (t2i-14B) run so far"


def boolean(text: str) -> bool:
    """`True`, `false`, `1`, `no` as the official script accepts them."""
    value = text.strip().lower()
    if value in ("true", "t", "yes", "y", "1"):
        return True
    if value in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not a boolean; write True or False")


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request")
    group.add_argument("--task", default="t2v-14B", choices=sorted(TASKS), help="default: t2v-14B")
    group.add_argument("--size", default="1280*720", help="width*height (default: 1280*720)")
    group.add_argument("--frame_num", type=int, help="frames, 4n+1 (default: 81, 1 for t2i)")
    group.add_argument("--sample_steps", type=int, help="default: 50, 40 for i2v")
    group.add_argument("--sample_shift", type=float, help="default: 5.0 (3.0 for i2v at 480p, 16 for flf2v and vace)")
    group.add_argument("--sample_guide_scale", type=float, default=5.0, help="default: 5.0")
    group.add_argument("--sample_solver", default="unipc", choices=("unipc", "dpm++"), help="default: unipc")
    group.add_argument("--base_seed", type=int, default=-1, help="default: -1, a random seed")
    group.add_argument("--prompt", default="", help="what the video shows")
    group.add_argument("--negative_prompt", help="default: the official one of the task")


def add_strategy_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("strategy")
    group.add_argument("--precision", default="fp16", choices=("fp16", "bf16", "fp32"), help="default: fp16")
    group.add_argument("--load_strategy", default="block", choices=("block", "full"), help="default: block (streamed)")
    group.add_argument(
        "--offload_model",
        type=boolean,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="default: True on one GPU",
    )
    group.add_argument("--t5_cpu", action="store_true", help="keep T5 on the CPU")
    group.add_argument("--attention_slicing", type=boolean, nargs="?", const=True, default=False, metavar="BOOL")
    group.add_argument("--gradient_checkpointing", type=boolean, nargs="?", const=True, default=False, metavar="BOOL")
    group.add_argument("--rows_per_chunk", type=int, help="rows of the sequence per chunk (default: near 8192)")
    group.add_argument(
        "--cfg", default="sequential", choices=("sequential", "joint"), help="how both guidance passes run"
    )
    group.add_argument("--expandable_segments", action="store_true", help="the allocator's expandable segments")
    group.add_argument("--ulysses_size", type=int, default=1)
    group.add_argument("--ring_size", type=int, default=1)
    group.add_argument("--t5_fsdp", action="store_true")
    group.add_argument("--dit_fsdp", action="store_true")


def config_from_flags(
    args: argparse.Namespace, *, device: str, weights: str, gpu: str | None, memory_limit_bytes: int | None
) -> RunConfig:
    """Checked RunConfig; raises InputError naming the flag."""
    task = TASKS[args.task]
    if task.name not in ("t2v-1.3B", "t2v-14B", "t2i-14B"):
        raise InputError(f"--task {task.name}: {UNSUPPORTED_TASKS_REASON}")
    request = Request.for_task(
        args.task,
        size=args.size,
        frame_num=args.frame_num,
        sample_steps=args.sample_steps,
        sample_shift=args.sample_shift,
        sample_guide_scale=args.sample_guide_scale,
        sample_solver=args.sample_solver,
        base_seed=args.base_seed,
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
    )
    strategy = Strategy(
        precision=args.precision,
        load_strategy=args.load_strategy,
        offload=args.offload_model,
        t5_cpu=args.t5_cpu,
        attention_slicing=args.attention_slicing,
        rows_per_chunk=args.rows_per_chunk,
        cfg=args.cfg,
        expandable_segments=args.expandable_segments,
        gradient_checkpointing=args.gradient_checkpointing,
        ulysses_size=args.ulysses_size,
        ring_size=args.ring_size,
        t5_fsdp=args.t5_fsdp,
        dit_fsdp=args.dit_fsdp,
    )
    name = f"{args.task}-{args.size.replace('*', 'x')}-{request.frame_num}"
    return RunConfig(
        name=name,
        description="from command line flags",
        device=device,
        request=request,
        strategy=strategy,
        measurement=Measurement(),
        weights=weights,
        gpu=gpu,
        memory_limit_bytes=memory_limit_bytes,
    )

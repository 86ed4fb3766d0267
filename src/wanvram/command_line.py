"""A configuration as the command that asks for it, quoted for a shell; the flags are those of cli.flags. No torch.

What a command line cannot say (several prompts, what to record) is left to a placeholder in capitals, or out.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from wanvram import knobs
from wanvram.config import RunConfig, Strategy
from wanvram.request import Request
from wanvram.units import exact

__all__ = ["MAX_COMMAND", "flag_of", "generate_command", "plan_command", "request_flags", "strategy_flags"]

MAX_COMMAND = 25_000  # characters: a prompt has at most 20,000
# Fields whose flag has another name.
_OTHER_FLAGS = {"prompts": "prompt_file", "weights": "ckpt_dir", "memory_limit_bytes": "vram"}


def generate_command(config: RunConfig) -> str:
    """`wanvram generate` of this configuration; checkpoint, prompt and pictures that are not given are placeholders."""
    request = config.request
    missing = [] if request.prompt or request.prompts else ["--prompt", "PROMPT"]
    for name in request.facts.pictures:
        missing += [] if getattr(request, name) is not None else [f"--{name}", name.upper()]
    weights, limit = "DIR" if config.weights == "random" else config.weights, config.memory_limit_bytes
    where = {"device": None if config.device == "auto" else config.device, "gpu": config.gpu, "link": config.link}
    where |= {"memory_limit_bytes": None if limit is None else exact(limit)}
    parts = ["wanvram", "generate", *request_flags(request), *missing, *strategy_flags(config.strategy)]
    return shlex.join([*parts, *_flags({"weights": weights} | where)])


def plan_command(
    request: Request,
    strategy: Strategy,
    *,
    vram: str | None,
    ram: str | None,
    gpu: str | None,
    link: str | None = None,
) -> str:
    """`wanvram plan` of this request; of the strategy only what the planner leaves to the user."""
    parts = ["wanvram", "plan", *request_flags(request), *strategy_flags(strategy, knobs.asked())]
    return shlex.join([*parts, *_flags({"vram": vram, "ram": ram, "gpu": gpu, "link": link})])


def request_flags(request: Request) -> list[str]:
    """task, size and frame_num, and everything in which the request differs from the defaults of its task."""
    plain = Request.for_task(request.task, size=request.size)
    names = [field.name for field in fields(Request)]
    said = [n for n in names if n in ("task", "size", "frame_num") or getattr(request, n) != getattr(plain, n)]
    return _flags({name: _text(name, getattr(request, name)) for name in said})


def strategy_flags(strategy: Strategy, among: Sequence[knobs.Knob[Any]] | None = None) -> list[str]:
    """Where the command line assumes something else, and where the strategy differs from the plain resident run."""
    said = (knob for knob in (knobs.TABLE if among is None else among) if knob.is_said(strategy))
    return _flags({knob.name: knob.of(strategy) for knob in said})


def flag_of(name: str) -> str:
    """The flag of a configuration's field."""
    knob = knobs.named(name)
    return knob.flag if knob is not None else f"--{_OTHER_FLAGS.get(name, name)}"


def _text(name: str, value: object) -> object:
    if name == "prompts":
        return "PROMPTS.txt"
    return ",".join(value) if isinstance(value, tuple) else value


def _flags(values: Mapping[str, Any]) -> list[str]:
    """`--name value` of what is not None; joined by `=` where the value would look like a flag itself."""
    result: list[str] = []
    for name, value in values.items():
        flag, text = flag_of(name), str(value)
        if value is not None:
            result += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return result

"""How several GPUs share the work where nobody said it: guidance first, then heads, then the sequence."""

from __future__ import annotations

import math
from dataclasses import replace

from wanvram import knobs
from wanvram.config import RunConfig
from wanvram.errors import InputError, require
from wanvram.knobs import Change
from wanvram.specs import DIT

__all__ = ["laid_out"]


def laid_out(config: RunConfig, gpus: int) -> RunConfig:
    """The configuration with sizes for so many GPUs; those that are given are kept. InputError where they are for another number.

    Guidance on two GPUs exchanges 19 MiB a step, Ulysses gigabytes, and the ring more with more memory than one GPU takes
    (docs/several-gpus.md).
    """
    sizes = {knob: knob.of(config.strategy) for knob in (knobs.CFG_SIZE, knobs.RING_SIZE, knobs.ULYSSES_SIZE)}
    given = math.prod(sizes.values())
    said = " x ".join(f"{knob.name} {size}" for knob, size in sizes.items())
    require(
        given in (1, gpus), f"{said} share the work of {given} GPUs, and {gpus} were asked for; give the same number"
    )
    if given == gpus:
        return config
    guided = config.request.guided and not knobs.CFG.differs(config.strategy)
    cfg = 2 if guided and gpus % 2 == 0 else 1
    ulysses = math.gcd(gpus // cfg, DIT[config.request.facts.dit].num_heads)
    values = {knobs.CFG_SIZE: cfg, knobs.ULYSSES_SIZE: ulysses, knobs.RING_SIZE: gpus // cfg // ulysses}
    try:
        return replace(config, strategy=Change(values).on(config.strategy))
    except InputError as error:
        raise InputError(f"{gpus} GPUs cannot share the work: {error}") from error

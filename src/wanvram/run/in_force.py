"""What is in force once CUDA has started, against what the configuration and its plan assume: checked before weights are loaded."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from wanvram.config import RunConfig
from wanvram.engine.cuda import CudaDevice
from wanvram.errors import DeviceError, InputError
from wanvram.kernels.attention_backends import BACKENDS
from wanvram.knobs import ATTENTION, EXPANDABLE_SEGMENTS
from wanvram.run.attention import attention_of, card_like, usable_here
from wanvram.simulate.gpus import GPU, find_gpu
from wanvram.simulate.libraries import KNOWN_TORCH
from wanvram.units import human

__all__ = ["check_in_force", "in_force"]

# What the allocator model knows, as PyTorch reports it.
_DEFAULTS = {"max_split_size": -1, "garbage_collection_threshold": 0.0}


def in_force(config: RunConfig, device: CudaDevice) -> dict[str, Any]:
    """Plain JSON values: allocator settings, its cap, which backends of attention work, and library versions, as they are now."""
    settings = torch.cuda.memory._snapshot(device.torch_device).get("allocator_settings", {})
    return {
        "allocator": torch.cuda.get_allocator_backend(),
        EXPANDABLE_SEGMENTS.name: bool(settings.get(EXPANDABLE_SEGMENTS.name, False)),
        "allocator_settings": {name: settings[name] for name in _DEFAULTS if name in settings},
        "allocator_limit_bytes": device.allocator_limit(),
        "attention": _attention(config, device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _attention(config: RunConfig, device: CudaDevice) -> dict[str, bool]:
    """Backends that the transformer's attention was given, and whether each can compute here."""
    if device.attention is None:
        return {}
    uses = {use.backend for use in (device.attention.self_attention, device.attention.cross_attention)}
    return usable_here(config, device, [backend for backend in BACKENDS if backend.name in uses])


def check_in_force(config: RunConfig, found: dict[str, Any], device: CudaDevice) -> None:
    """Raises DeviceError that names both sides where the strategy, the limit or the plan's card say otherwise."""
    actual, wanted = found[EXPANDABLE_SEGMENTS.name], EXPANDABLE_SEGMENTS.of(config.strategy)
    _must(
        actual == wanted,
        f"{EXPANDABLE_SEGMENTS.name} is {actual} in PyTorch's allocator but {wanted} in the configuration: "
        "it was started before it could be told; start a fresh process",
    )
    for backend, works in found["attention"].items():
        assumed = "the plan assumed" if config.gpu is not None else "this card is given"
        _must(
            works,
            f"{assumed} {backend} for attention, but PyTorch {found['torch']} refuses it here; unset what disables it, or use "
            f"{ATTENTION.asked(ATTENTION.default)} or another of {', '.join(ATTENTION.choices[1:])}",
        )
    if config.memory_limit_bytes is None:
        return
    limit = found["allocator_limit_bytes"]
    _must(
        limit is not None and limit <= config.memory_limit_bytes,
        f"the allocator may take {'any amount' if limit is None else human(limit)}, but the budget is {human(config.memory_limit_bytes)}",
    )
    if config.gpu is not None:
        _check_plan(config, found, device)


def _check_plan(config: RunConfig, found: dict[str, Any], device: CudaDevice) -> None:
    """A budget's configuration names the card that it was planned for."""
    card = find_gpu(config.gpu or "")
    here = device.name.removeprefix("cuda:")
    total = torch.cuda.get_device_properties(device.torch_device).total_memory
    with suppress(InputError):  # a card that no table knows was given the nearest name
        same = card.path is not None or find_gpu(here, total).key == card.key
        _must(same, f"the plan is for {card.name}, but the card here is {here}; plan again")
    _check_attention(config, card, device)
    version = tuple(int(part) for part in found["torch"].split("+")[0].split(".")[:2])
    first, last = KNOWN_TORCH
    _must(
        first <= version < last,
        f"PyTorch {found['torch']} is installed, but the plan's rules are of {first[0]}.{first[1]} up to before {last[0]}.{last[1]}",
    )
    _must(
        found["allocator"] == "native"
        and all(found["allocator_settings"].get(k, v) == v for k, v in _DEFAULTS.items()),
        f"the allocator is {found['allocator']} with {found['allocator_settings']}, but the plan assumed native with its defaults",
    )


def _check_attention(config: RunConfig, card: GPU, device: CudaDevice) -> None:
    """A plan names its backend; where a configuration with a card says auto, what that means without this machine is meant."""
    assumed = attention_of(config, card_like(card, here=False))
    if device.attention is None:
        return
    _must(
        assumed.taken == device.attention.taken,
        f"attention: the plan for {card.name} assumed {assumed.taken}, but {device.attention.taken} is taken here "
        f"({device.attention.basis}): memory and time are not those of this run; plan again here, or add "
        f"{ATTENTION.asked(assumed.taken)}" + (f" ({device.attention.note})" if device.attention.note else ""),
    )


def _must(condition: bool, sentence: str) -> None:
    if not condition:
        raise DeviceError(sentence)

"""What a configuration's attention comes to on the card it runs on, the same for a simulated card and for the one that is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from wanvram.config import RunConfig
from wanvram.engine.cuda import CudaDevice
from wanvram.errors import InputError
from wanvram.kernels.attention_backends import AUTO, BACKENDS, Backend
from wanvram.kernels.fused_attention import usable, why_broken
from wanvram.knobs import ATTENTION, PRECISION
from wanvram.machine.attention_choice import BY_NAME, Card, Heads, choose
from wanvram.machine.attention_speed import checked_here
from wanvram.machine.imports import forget_imported, imported_before, keep_imported
from wanvram.models.precision import PRECISIONS
from wanvram.record import AttentionChoice
from wanvram.simulate.gpus import GPU, find_gpu
from wanvram.specs import DIT

__all__ = ["attention_of", "card_here", "card_like", "usable_here"]


def attention_of(config: RunConfig, card: Card, *, running: bool = False) -> AttentionChoice:
    """Raises InputError where the card cannot compute what was asked for. `auto` passes over what cannot be imported here.

    running: this process is the one that computes, so that nothing is taken on trust.
    """
    request = config.request
    shape = request.geometry.latent_shape(request.frame_num, request.height, request.width)
    itemsize = PRECISIONS[PRECISION.of(config.strategy)].matmul.itemsize
    heads = Heads(itemsize, DIT[request.facts.dit].head_dim, request.geometry.tokens(shape))
    asked = ATTENTION.of(config.strategy)
    choice = choose(asked, card, heads)
    if not card.here or not (running or asked == AUTO):
        return choice
    reason = _why_broken(BY_NAME[choice.taken], anew=running)
    if reason is None or asked != AUTO:  # by its name it ends the run at its first call
        return choice
    note = "; ".join(filter(None, [card.note, f"{choice.taken} was passed over: {reason}"]))
    return choose(asked, replace(card, refused=card.refused | {choice.taken}, note=note), heads)


def _why_broken(backend: Backend, *, anew: bool) -> str | None:
    if backend.package is None or (not anew and imported_before(backend.package)):
        return None
    reason = why_broken(backend)
    if reason is not None:
        forget_imported(backend.package)
    elif backend.version() is not None:
        keep_imported(backend.package)
    return reason


def card_like(gpu: GPU, *, here: bool) -> Card:
    """A card that is simulated. here: it is the one in this machine, so what was measured here counts."""
    checked, note = checked_here() if here and not gpu.measured else (None, "")
    return Card(gpu.name, gpu.compute_capability, gpu.measured, checked, note, here=here)


def card_here(config: RunConfig, device: CudaDevice) -> Card:
    """The one that a run is on, with what its PyTorch refuses."""
    name, total = device.name.removeprefix("cuda:"), torch.cuda.get_device_properties(device.torch_device).total_memory
    try:
        card = card_like(find_gpu(name, total), here=True)
    except InputError:
        checked, note = checked_here()
        capability = torch.cuda.get_device_capability(device.torch_device)
        card = Card(name, capability, False, checked, note, here=True)
    return replace(card, refused=_refused(config, device))


def _refused(config: RunConfig, device: CudaDevice) -> frozenset[str]:
    """PyTorch's backends that this build of it does not have, or that somebody disabled."""
    found = usable_here(config, device, [backend for backend in BACKENDS if backend.sdp_choice is not None])
    return frozenset(name for name, works in found.items() if not works)


def usable_here(config: RunConfig, device: CudaDevice, backends: Iterable[Backend]) -> dict[str, bool]:
    """Whether each of these can compute the transformer's attention, by name."""
    dtype = PRECISIONS[PRECISION.of(config.strategy)].matmul
    like = torch.empty((64, 1, DIT[config.request.facts.dit].head_dim), dtype=dtype, device=device.torch_device)
    found = {backend.name: usable(backend, like) for backend in backends}
    del like
    torch.cuda.empty_cache()  # the run begins with an empty allocator
    return found

"""What may compute attention: on which cards and shapes, with what, at which rate, and what it takes beside its output. No torch.

The real device (kernels.scaled_attention), the simulated one (its buffers and its clock) and the check of what is in force
(run.in_force) ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

__all__ = ["BACKENDS", "Backend", "chosen", "named"]

Capability = tuple[int, int]
# Bytes (taken before the output and freed last, after it and freed at once).
Extra = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Backend:
    """cards: compute capabilities from, to before. max_head_dim: None: any. sdp_choice: PyTorch's number (SDPBackend).

    reached: bytes of a number -> the Efficiency of a card that says which share of its rate is reached; no other numbers are
    taken. extra: (query rows, heads) -> what is taken beside the output. library: loaded at the first use. compute:
    module:function of q [Lq,H,D], k, v [Lk,H,D] -> [Lq,H,D].
    """

    name: str
    cards: tuple[Capability, Capability | None]
    max_head_dim: int | None
    reached: Mapping[int, str]
    extra: Callable[[int, int], Extra]
    library: str | None
    sdp_choice: int
    compute: str = "wanvram.kernels.scaled_attention:scaled_dot_product"

    def takes(self, capability: Capability, dtype_bytes: int, head_dim: int) -> bool:
        first, last = self.cards
        card = first <= capability and (last is None or capability < last)
        return card and dtype_bytes in self.reached and (self.max_head_dim is None or head_dim <= self.max_head_dim)

    def function(self) -> Callable[..., Any]:
        """What computes it; imports torch."""
        module, _, name = self.compute.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


# In the order in which scaled_dot_product_attention looks for one (PyTorch's sdp_utils.cpp). Bytes: cudnn two 8-byte seeds and 256
# bytes (measured); flash fp32 log-sum-exp and two seeds; efficient nothing (measured).
BACKENDS = (
    Backend("cudnn", ((9, 0), (12, 0)), 128, {2: "attention"}, lambda lq, heads: ((8, 8), (256,)), "attention", 3),
    Backend("flash", ((8, 0), None), 256, {2: "attention"}, lambda lq, heads: ((), (4 * heads * lq, 16, 8)), None, 1),
    Backend(
        "efficient",
        ((0, 0), None),
        None,
        {1: "attention_fp32", 2: "attention", 4: "attention_fp32", 8: "attention_fp32"},
        lambda lq, heads: ((), ()),
        None,
        2,
    ),
)


@cache
def chosen(capability: Capability, dtype_bytes: int, head_dim: int) -> Backend:
    """The first that takes these numbers and heads on such a card."""
    return next(backend for backend in BACKENDS if backend.takes(capability, dtype_bytes, head_dim))


def named(sdp_choice: int) -> str:
    """What PyTorch says it takes, by our names."""
    others = {0: "math"}
    return {backend.sdp_choice: backend.name for backend in BACKENDS}.get(sdp_choice, others.get(sdp_choice, "other"))

"""What may compute attention: on which cards and shapes, with what, at which rate, and what it takes beside its output. No torch.

The real device (kernels.scaled_attention), the simulated one (its buffers and its clock), the choice (machine.attention_choice) and
the check of what is in force (run.in_force) ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from typing import Any

__all__ = ["AUTO", "BACKENDS", "FA4", "LONG_KEYS", "Backend", "Rate", "chosen", "is_for_long"]

Capability = tuple[int, int]
Cards = tuple[Capability, Capability | None]  # compute capabilities from, to before
# Bytes (taken before the output and freed last, after it and freed at once).
Extra = tuple[tuple[int, ...], tuple[int, ...]]

AUTO = "auto"  # not a backend: PyTorch's own order, until machine.attention_choice has named one
FA4 = "fa4"
LONG_KEYS = 4096  # of more keys: the video's own tokens from 0.4 megapixels on; text has 512, a picture 257
EVERY: Cards = ((0, 0), None)
SM_80, SM_90, SM_100, SM_120 = (8, 0), (9, 0), (10, 0), (12, 0)


@dataclass(frozen=True)
class Rate:
    """On these cards long 16-bit attention reaches `pace` times the share Efficiency.attention of a card's products. source: why."""

    cards: Cards
    pace: float
    source: str


@dataclass(frozen=True)
class Backend:
    """cards: that it computes on. max_head_dim: None: any. sdp_choice: PyTorch's number (SDPBackend), None: not PyTorch's.

    reached: bytes of a number -> the Efficiency of a card that says which share of its rate is reached; no other numbers are
    taken. rates: the first that has a card counts. extra: (query rows, heads) -> what is taken beside the output. library: loaded
    at the first use. more_keys_than: with fewer keys another is faster, and taken. package: to be installed.
    taken_on: cards whose long attention `auto` gives it where the package is installed.
    """

    name: str
    rates: tuple[Rate, ...]
    cards: Cards = EVERY
    max_head_dim: int | None = None
    reached: Mapping[int, str] = field(default_factory=lambda: {2: "attention"})
    extra: Callable[[int, int], Extra] = lambda lq, heads: ((), ())
    library: str | None = None
    sdp_choice: int | None = None
    more_keys_than: int = 0
    package: str | None = None
    taken_on: Cards | None = None

    def on(self, capability: Capability) -> bool:
        return _among(capability, self.cards)

    def takes(self, capability: Capability, dtype_bytes: int, head_dim: int) -> bool:
        heads = self.max_head_dim is None or head_dim <= self.max_head_dim
        return self.on(capability) and dtype_bytes in self.reached and heads

    def rate(self, capability: Capability) -> Rate:
        return next(rate for rate in self.rates if _among(capability, rate.cards))

    def is_taken_on(self, capability: Capability) -> bool:
        return self.taken_on is not None and _among(capability, self.taken_on)

    def version(self) -> str | None:
        """Of the package, without importing it; None where it is not installed or none is needed."""
        try:
            return None if self.package is None else metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def function(self) -> Callable[..., Any]:
        """Of its name in fused_attention: of q [Lq,H,D], k, v [Lk,H,D] and whether sums are wanted -> [Lq,H,D] and natural
        log-sum-exps, float32 [H,Lq] or None. Imports torch."""
        found: Callable[..., Any] = getattr(import_module("wanvram.kernels.fused_attention"), self.name)
        return found


def _among(capability: Capability, cards: Cards) -> bool:
    first, last = cards
    return first <= capability and (last is None or capability < last)


_H200 = "measured on an H200"
_FA2 = "0.50 to 0.73 of an A100's peak (arXiv 2307.08691); public runs on RTX 4090 and A100 agree within 5 % (docs/cards.md)"
_FA2_OLD = "assumption: 0.8 of the H200's rate for each SM and clock, by the older instructions"
_FA2_NEW = "the share of Ada; a public run on an RTX 5090 agrees within 6 % (docs/cards.md)"
_FA2_PAPER = "the paper of FlashAttention-2 (arXiv 2307.08691): 1.3 to 2.5 times as fast as its like; 0.4 is counted"
_FA4_PAPER = "the paper of FlashAttention-4 (2026): up to 1.3 times cuDNN on a B200; 1.2 is counted"

# PyTorch's in the order in which scaled_dot_product_attention looks for one (sdp_utils.cpp). Bytes: cudnn two 8-byte seeds and 256
# bytes (measured); flash fp32 log-sum-exp and two seeds, and partial sums that are not counted where heads x rows / 64 are fewer than
# 1.6 x multiprocessors (4 heads of 2048 rows on an H200: 8 MiB), which no step of Wan2.1 has; efficient and fa4 nothing (measured).
# Paces on the H200 from 40 heads x 75600 x 75600: 561, 356 and 669 TFLOP/s; efficient 178 for 8192 queries. fa4 takes 2.1 ms where cudnn
# takes 1.5 for the 512 keys of a prompt. Its kernels: own ones for sm_90 and sm_100; sm_8x and sm_120 share one of the same instructions
# as FlashAttention-2, which its authors have yet to tune, so `auto` leaves it alone there until `wanvram check --attention` has found it
# faster.
BACKENDS = (
    Backend(
        "cudnn",
        (Rate((SM_90, SM_100), 1.0, _H200), Rate(EVERY, 1.0, "assumption: the share of the H200")),
        cards=(SM_90, SM_120),
        max_head_dim=128,
        extra=lambda lq, heads: ((8, 8), (256,)),
        library="attention",
        sdp_choice=3,
    ),
    Backend(
        "flash",
        (
            Rate((SM_90, SM_100), 0.63, _H200),
            Rate((SM_100, SM_120), 0.35, _FA2_OLD),
            Rate((SM_120, None), 1.0, _FA2_NEW),
            Rate(EVERY, 1.0, _FA2),
        ),
        cards=(SM_80, None),
        max_head_dim=256,
        extra=lambda lq, heads: ((), (4 * heads * lq, 16, 8)),
        sdp_choice=1,
    ),
    Backend(
        "efficient",
        (
            Rate(((0, 0), SM_80), 1.0, "assumption: the share of newer cards"),
            Rate((SM_90, SM_100), 0.32, _H200),
            Rate(EVERY, 0.4, _FA2_PAPER),
        ),
        reached={1: "attention_fp32", 2: "attention", 4: "attention_fp32", 8: "attention_fp32"},
        sdp_choice=2,
    ),
    Backend(
        FA4,
        (
            Rate((SM_90, SM_100), 1.18, _H200),
            Rate((SM_100, SM_120), 1.2, _FA4_PAPER),
            Rate(EVERY, 1.0, "assumption: no faster than FlashAttention-2, whose instructions it uses"),
        ),
        cards=(SM_80, (13, 0)),
        max_head_dim=128,
        library="fa4",
        more_keys_than=LONG_KEYS,
        package="flash-attn-4",
        taken_on=(SM_90, (11, 0)),
    ),
)


@cache
def chosen(capability: Capability, dtype_bytes: int, head_dim: int, keys: int = 0, asked: str = AUTO) -> Backend:
    """What attends to so many keys: the backend asked for, where it takes these, else the first of PyTorch's that does."""
    able = [backend for backend in BACKENDS if backend.takes(capability, dtype_bytes, head_dim)]
    given = [backend for backend in able if backend.name == asked and keys > backend.more_keys_than]
    return (given or [backend for backend in able if backend.package is None])[0]


def is_for_long(asked: str) -> bool:
    """Whether another backend attends to few keys."""
    return any(backend.name == asked and backend.more_keys_than for backend in BACKENDS)

"""cuDNN's workspace for one convolution of frames or of a picture, channels last: rules of its kernels on sm_90, and where
each is taken. No torch.

Found from measured workspaces (benchmarks/harvest_conv_workspaces.py, H200, cuDNN 9.19), which the rules give to the byte.
cuDNN's choice of kernel hangs on the weight's shape and the area H x W of the input, for most weights on nothing else:
conv_workspaces.json has, for each weight, the kernels of each range of the area ("regimes"), and the shapes that were measured
otherwise ("exceptions"); benchmarks/fit_conv_workspaces.py writes it.

Implicit GEMM kernels tile the output [M, O], M positions. Full waves of tiles, one tile per multiprocessor, take nothing. The tiles
that are left over are split along the sum over inputs, so that the last wave fills the card too: every part takes a float32 tile,
and every tile a counter of 4 bytes for each pair that is added on each level of a tree. Other kernels copy operands into another
layout.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import prod
from typing import Any, NamedTuple

__all__ = [
    "Convolution",
    "Regimes",
    "Table",
    "Workspace",
    "kernel_names",
    "kernel_workspace",
    "workspace",
]

UNKNOWN_BYTES = 131  # the commonest workspace
# Rows x columns: for larger inputs no weight was seen to change to a kernel with another workspace.
LAST_CHANGE = 16_384
SAME_BYTES = 512  # the allocator's smallest block: 0 or 131 bytes make no difference that counts

Regimes = list[list[Any]]  # [first area, last area, kernel, other kernels...]


class Convolution(NamedTuple):
    """dtype as torch names it; x [C,T,H,W]; weight [O,I,kT,kH,kW]; stride and padding [T,H,W]. Of a picture without T."""

    dtype: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @classmethod
    def of(cls, x: Any, weight: Any, _bias: Any, stride: Sequence[int], padding: Sequence[int]) -> Convolution:
        """Of tensors x [1,C,T,H,W] or [1,C,H,W], and weight."""
        name = str(x.dtype).removeprefix("torch.")
        return cls(name, tuple(x.shape[1:]), tuple(weight.shape), tuple(stride), tuple(padding))

    @property
    def kind(self) -> str:
        return f"{self.dtype} {_text(self.weight)} {_text(self.stride)}"

    @property
    def key(self) -> str:
        """In float32 the same for frames and their transpose: they took the same at each of 16,915 measured pairs. Pictures may not."""
        x, padding = self.x, self.padding
        if self.dtype == "float32" and len(x) == 4 and (x[3], padding[2]) < (x[2], padding[1]):
            x, padding = (x[0], x[1], x[3], x[2]), (padding[0], padding[2], padding[1])
        return f"{self.dtype} {_text(x)} {_text(self.weight)} {_text(self.stride)} {_text(padding)}"

    @property
    def positions(self) -> int:
        """M: output frames x rows x columns."""
        sizes = zip(self.x[1:], self.weight[2:], self.stride, self.padding, strict=True)
        return prod((length + 2 * pad - kernel) // step + 1 for length, kernel, step, pad in sizes)

    @property
    def area(self) -> int:
        """Rows x columns of the input, without padding."""
        return self.x[-2] * self.x[-1]

    def copies(self, *parts: str, channels: int = 1) -> int:
        """Bytes of copies of x, weight or out, their channels rounded up to a multiple, and 16 for their alignment."""
        outputs, inputs, *taps = self.weight
        outputs, inputs = _up(outputs, channels) * channels, _up(inputs, channels) * channels
        elements = {"x": inputs * prod(self.x[1:]), "w": outputs * inputs * prod(taps), "out": outputs * self.positions}
        width = 4 if self.dtype == "float32" else 2
        return sum(_up(elements[part] * width, 16) * 16 for part in parts) + 16


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


@dataclass(frozen=True)
class StreamK:
    """A kernel with output tiles of rows x columns in clusters of cluster_rows x cluster_columns, `wave` tiles at a time on the H200's
    132 multiprocessors, that adds `step` inputs of one filter tap at a time.

    most: (dtype, steps of the whole sum) -> parts of a tile at most, or a tuple of all counts it chooses from. With " first"
    after the dtype: where there is no full wave before. As measured; what is absent has no limit.
    """

    rows: int
    columns: int
    cluster_rows: int
    cluster_columns: int
    wave: int
    step: int
    most: Mapping[tuple[str, int], int | tuple[int, ...]] = field(default_factory=dict)
    splits: bool = True

    def workspace(self, conv: Convolution) -> int:
        """Bytes. From the third wave on the tiles are handed out by a counter: 4 bytes, with alignment 131 where no tile is split."""
        outputs, inputs, *taps = conv.weight
        down = _up(_up(conv.positions, self.rows), self.cluster_rows) * self.cluster_rows
        across = _up(_up(outputs, self.columns), self.cluster_columns) * self.cluster_columns
        tiles = down * across
        counter = 4 if tiles > 2 * self.wave else 0
        parts = 1
        if self.splits and (left_over := tiles % self.wave):
            steps = prod(taps) * _up(inputs, self.step)
            parts = self._parts(conv.dtype, steps, self.wave // left_over, first=tiles < self.wave)
        if parts == 1:
            return counter and counter + 127
        return left_over * (parts * self.rows * self.columns * 4 + 4 * _pairs(parts)) + counter + 159

    def _parts(self, dtype: str, steps: int, room: int, first: bool) -> int:
        limit = self.most.get((dtype, steps), steps)
        most = self.most.get((f"{dtype} first", steps), limit) if first else limit
        if isinstance(most, tuple):
            return max((count for count in most if count <= room), default=1)
        return _up(steps, _up(steps, min(room, most)))


def _up(length: int, step: int) -> int:
    return -(-length // step)


def _pairs(parts: int) -> int:
    """Additions in pairs on all levels of a tree over `parts`."""
    total = 0
    while parts > 1:
        parts = _up(parts, 2)
        total += parts
    return total


F32, F16, BF16 = "float32", "float16", "bfloat16"
# Names as the profiler has them: sm90_xmma_fprop_implicit_gemm_..._tilesize128x128x32_..._segment_k_on.
STREAM_K = {
    "128x128x32": StreamK(
        *(128, 128, 1, 2, 132, 32),
        {(F32, 18): 2, (F32, 36): 4, (F32, 54): 8, (F32, 81): 17, (F32, 108): 27, (F32, 162): 33}
        | {(f"{F32} first", 36): 2, (f"{F32} first", 54): 2},
    ),
    "128x128x32-tall": StreamK(128, 128, 8, 1, 120, 32, {(F32, 27): (2, 4), (F32, 54): 8}),
    "64x64x32": StreamK(64, 64, 2, 4, 120, 32, {(F32, 27): 2, (F32, 54): 4}),
    "256x128x64": StreamK(
        256, 128, 1, 2, 132, 64, {(BF16, 81): 2, (BF16, 162): 8, (f"{BF16} first", 162): 2, (F16, 81): 27}
    ),
    "128x256x64": StreamK(128, 256, 1, 2, 132, 64, {(F16, 18): 4, (F16, 27): 9}),
    "128x64x64": StreamK(128, 64, 1, 4, 120, 64, {(F16, 27): (2, 3, 4, 7), (f"{F16} first", 54): 4}),
    "256x32x32": StreamK(256, 32, 1, 1, 132, 32, splits=False),
    "128x32x32": StreamK(128, 32, 1, 1, 132, 32, splits=False),
    "128x128x64": StreamK(128, 128, 1, 2, 132, 64, splits=False),
    "64x192x64": StreamK(64, 192, 1, 1, 132, 64, splits=False),
    "64x128x64": StreamK(64, 128, 1, 2, 132, 64, splits=False),
    "64x64x64": StreamK(64, 64, 2, 4, 120, 64, splits=False),
}
COPIES: dict[str, tuple[tuple[str, ...], int]] = {  # what is copied, channels rounded up to
    "weight": (("w",), 1),
    "in": (("x", "w"), 1),
    "in-out": (("x", "w", "out"), 1),
    "padded-in": (("x", "w"), 8),
    "padded-out": (("w", "out"), 8),
}


def kernel_names(dtype: str) -> list[str]:
    """Those that kernel_workspace takes, but constants and pairs."""
    narrow = {"128x32x32", "256x32x32"}  # in float32 and 16-bit types
    products = [n for n, kernel in STREAM_K.items() if n in narrow or (kernel.step == 32) == (dtype == "float32")]
    return [*products, *COPIES, "padded-out-counter", "in-out-split"]


def kernel_workspace(kernel: str, conv: Convolution) -> int:
    """Bytes. kernel: one of kernel_names(), a constant, or a pair "a|b": a where M is a multiple of 4, as in-out needs, else b."""
    if "|" in kernel:
        kernel = kernel.split("|")[conv.positions % 4 != 0]
    if kernel.isdigit():
        return int(kernel)
    if kernel in STREAM_K:
        return STREAM_K[kernel].workspace(conv)
    if kernel == "in-out-split":  # beside the copies a tile of 64x64 and four counters for every output tile
        tiles = _up(conv.positions, 64) * _up(conv.weight[0], 64)
        return conv.copies("x", "w", "out") + tiles * (64 * 64 * 4 + 16) + 159
    parts, channels = COPIES[kernel.removesuffix("-counter")]
    return conv.copies(*parts, channels=channels) + 131 * kernel.endswith("-counter")


class Workspace(NamedTuple):
    """size: bytes, never less than measured so far. lowest: what it may be instead.

    basis: "measured", "rule" (the shape lies among measured ones that all follow one kernel's rule), "bound" (among or between
    shapes of several kernels: the largest of theirs), "outside" (smaller than all measured, counted like the nearest) or
    "unknown" (no such weight was ever measured).
    """

    size: int
    lowest: int
    basis: str


class Table:
    """regimes: kind -> ranges of the input's area in rising order, see Regimes. exceptions: key -> bytes."""

    def __init__(self, regimes: Mapping[str, Regimes], exceptions: Mapping[str, int]) -> None:
        self.regimes, self.exceptions = regimes, exceptions

    def workspace(self, conv: Convolution) -> Workspace:
        measured = self.exceptions.get(conv.key)
        if measured is not None:
            return Workspace(measured, measured, "measured")
        regimes = self.regimes.get(conv.kind)
        if not regimes:
            return Workspace(UNKNOWN_BYTES, UNKNOWN_BYTES, "unknown")
        after = bisect_right(regimes, conv.area, key=lambda regime: regime[0])
        inside = after > 0 and conv.area <= regimes[after - 1][1]
        near = regimes[after - 1 : after] if inside else regimes[max(after - 1, 0) : after + 1]
        kernels = [name for _, _, *names in near for name in names]
        if conv.positions % 4:
            kernels = [name for name in kernels if name != "in-out"] or kernels
        sizes = [kernel_workspace(kernel, conv) for kernel in kernels]
        if conv.area < regimes[0][0] or regimes[-1][1] < conv.area < LAST_CHANGE:
            return Workspace(max(sizes), min(sizes), "outside")
        if max(sizes) - min(sizes) < SAME_BYTES:
            return Workspace(sizes[0], sizes[0], "rule")
        return Workspace(max(sizes), min(sizes), "bound")


@cache
def _table() -> Table:
    file = resources.files("wanvram.simulate").joinpath("conv_workspaces.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    return Table(content["regimes"], content["exceptions"])


def workspace(conv: Convolution) -> Workspace:
    """What cuDNN takes for it on a card of sm_90."""
    return _table().workspace(conv)

"""Building blocks of the causal video VAE: each takes one frame [1,C,1,H,W] (channels_last_3d) and returns one.

A temporal convolution needs the two frames before its own. They live in a `Stream`, one per call, never in a module,
so an abandoned call leaves nothing behind. What exists beyond those caches is bounded: a convolution gathers its
three input frames in a window of about BAND_BYTES, a band of rows at a time (rows of a convolution are independent
but for a halo of one), norm and SiLU write directly into the window, and the residual is added in place. In float32 the window
is one picture with the channels of its three frames beside each other, where cuDNN is faster (`kernels.conv`).

Blocks own the frame they are given: a residual block overwrites it. A frame may be a part of the picture (a tile,
`vae_tiles`): then the stream says how much of each output to leave out, where padding stood for unknown neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanvram.kernels.channel_norm import fill_window, rms_norm_silu
from wanvram.kernels.conv import conv2d, conv3d, frame_attention, place_frame
from wanvram.units import MIB

__all__ = [
    "AttentionBlock",
    "Conv",
    "Cut",
    "Downsample",
    "Gamma",
    "LastConv",
    "ResidualBlock",
    "Stream",
    "Upsample",
    "new_frames",
]

# The window of 96 channels at 480x832 is 439 MiB: 4 bands. A band of 110 MiB keeps an H200 busy for 0.4 ms.
BAND_BYTES = 128 * MIB
UNIT = (1, 1, 1)
EVERYTHING = slice(None)


def new_frames(like: Tensor, channels: int, count: int, height: int, width: int) -> Tensor:
    """Uninitialised [1, channels, count, height, width] in channels_last_3d."""
    shape = (1, channels, count, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def new_picture(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised [1, channels, height, width] in channels_last."""
    shape = (1, channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def positions(x: Tensor) -> Tensor:
    """View one frame, or rows of one, [1,C,1,H,W] as [H*W, C]."""
    return x.permute(0, 2, 3, 4, 1).view(-1, x.shape[1])


def with_bias(band: Tensor, bias: Tensor) -> Tensor:
    """band [1,C,1,H,W] + bias [C] in channels_last_3d: in place, or where the band is a part of a frame a new one."""
    column = bias.view(-1, 1, 1, 1)
    return band.add_(column) if band.is_contiguous(memory_format=torch.channels_last_3d) else band + column


class Cut(NamedTuple):
    """Rows and columns an operation leaves out of its output."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def of(self, x: Tensor) -> Tensor:
        """View of x [...,H,W] without them."""
        rows = x[..., self.top : x.shape[-2] - self.bottom, :] if self.top or self.bottom else x
        return self.columns(rows)

    def columns(self, x: Tensor) -> Tensor:
        return x[..., self.left : x.shape[-1] - self.right] if self.left or self.right else x


NO_CUT = Cut()


class Stream:
    """Everything one encode or decode call remembers between frames.

    remember False (the call has a single frame): nothing is kept, and a temporal convolution is its last tap alone,
    because its history is zero. cuts: for a tile, what convolutions and residual blocks leave out of their output;
    a convolution that pads by p leaves out p at most.
    """

    def __init__(self, remember: bool, cuts: Mapping[nn.Module, Cut] | None = None) -> None:
        self.remember = remember
        self.tiled = cuts is not None
        self.cuts = cuts or {}
        self.frames: dict[nn.Module, list[Tensor]] = {}
        self.weights: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.started: set[nn.Module] = set()

    def starts(self, module: nn.Module) -> bool:
        """True at the first call for this module."""
        first = module not in self.started
        self.started.add(module)
        return first

    def cut(self, module: nn.Module) -> Cut:
        return self.cuts.get(module, NO_CUT)

    def bands(self, start: int, stop: int, window_bytes: int) -> list[tuple[int, int]]:
        """Row ranges from start to stop that cut a window of `window_bytes` into parts of about a band's bytes."""
        if window_bytes <= BAND_BYTES:
            return [(start, stop)]
        rows = -(-(stop - start) // -(-window_bytes // BAND_BYTES))
        return [(top, min(top + rows, stop)) for top in range(start, stop, rows)]

    def convolve(self, window: Tensor, weight: Tensor, sides: Cut) -> Tensor:
        """A convolution padded to the window's size, without `sides` of its output and without bias: a view or a new tensor, one frame.

        window and weight: frames, or one picture (Conv.flat). In a tile, where both sides of a direction go, they are not
        computed, which also spares a copy.
        """
        halo = weight.shape[-1] // 2
        rows = 0 if self.tiled and min(sides.top, sides.bottom) >= halo else halo
        columns = 0 if self.tiled and min(sides.left, sides.right) >= halo else halo
        if weight.dim() == 4:
            out = conv2d(window, weight, None, UNIT[1:], (rows, columns)).unsqueeze(2)
        else:
            out = conv3d(window, weight, None, UNIT, (0, rows, columns))
        known, ahead = halo - rows, halo - columns
        return Cut(sides.top - known, sides.bottom - known, sides.left - ahead, sides.right - ahead).of(out)

    def history(self, module: nn.Module, like: Tensor) -> list[Tensor]:
        """The two input frames before this one, oldest first, zero before the first frame; [] if nothing is kept."""
        if not self.remember:
            return []
        if module not in self.frames:
            _, channels, _, height, width = like.shape
            self.frames[module] = [new_frames(like, channels, 1, height, width).zero_() for _ in range(2)]
        return self.frames[module]


class Gamma(nn.Module):
    """The scale of a channel norm."""

    def __init__(self, channels: int, trailing: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty((channels, *[1] * trailing), dtype=dtype), requires_grad=False)

    def write(self, x: Tensor, out: Tensor, silu: bool) -> None:
        rms_norm_silu(positions(x), self.gamma.view(-1), positions(out), silu)


class Conv(nn.Module):
    """Parameters of a convolution, stored channels last: copying weights into them keeps the strides.

    flat: the inputs of all frames lie beside each other in the weight, and in `causal` and an upsampling the window is one
    picture: in float32, where cuDNN takes 1.1 to 2 times as long for frames (H200; in 16 bits 0.8 to 1.5), and where it stays in
    channels_last, which it leaves for the 9 channels of three RGB frames.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.flat = dtype == torch.float32 and kernel[-1] > 1 and inputs % 4 == 0
        self.halo = kernel[-1] // 2
        if self.flat and len(kernel) == 3:
            frames, height, width = kernel
            weight = torch.empty((outputs, height, width, frames, inputs), dtype=dtype).permute(0, 4, 3, 1, 2)
        else:
            layout = torch.channels_last_3d if len(kernel) == 3 else torch.channels_last
            weight = torch.empty((outputs, inputs, *kernel), dtype=dtype, memory_format=layout)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False)

    def matrix(self) -> Tensor:
        """The weight of a convolution without extent as [inputs, outputs]."""
        return self.weight.view(self.weight.shape[:2]).t()

    def pointwise(self, x: Tensor) -> Tensor:
        """A convolution without extent."""
        return conv3d(x, self.weight, self.bias, UNIT, (0, 0, 0))

    def causal(
        self,
        x: Tensor,
        stream: Stream,
        norm: Gamma | None = None,
        add_to: Tensor | None = None,
        outputs: slice = EVERYTHING,
        commit: bool = True,
    ) -> Tensor:
        """The output frame at the time of x, of SiLU(norm(x)) where norm is given.

        add_to: the result is added to this frame, or part of one, which is returned; where a tile has one band, the sum is a frame of its
        own, which spares the caller a copy. outputs: compute these channels only.
        commit False: x does not become history yet (the same x comes again).
        """
        history = stream.history(self, x)
        weight, bias = self._taps(len(history), outputs, stream)
        halo, (_, channels, _, height, columns) = self.halo, x.shape
        cut = stream.cut(self)
        start, stop = cut.top, height - cut.bottom
        ranges = stream.bands(start, stop, (len(history) + 1) * x.nbytes)
        whole = len(ranges) == 1
        width = columns - cut.left - cut.right
        if add_to is not None:
            out = add_to
        elif not whole:
            out = new_frames(x, weight.shape[0], 1, stop - start, width)
        for top, bottom in ranges:
            first, last = max(top - halo, 0), min(bottom + halo, height)
            if self.flat:
                window = new_picture(x, (len(history) + 1) * channels, last - first, columns)
            else:
                window = new_frames(x, channels, len(history) + 1, last - first, columns)
            # Rows above the next window are needed from the oldest frame no more: the newest takes their place.
            committed = (height if bottom == stop else bottom - halo) - first if commit else 0
            fill_window(x, history, norm.gamma if norm else None, window, first * columns, committed * columns)
            sides = Cut(top - first, last - bottom, cut.left, cut.right)
            band = stream.convolve(window, weight, sides)
            del window
            if not whole:
                place_frame(band, bias, out[..., top - start : bottom - start, :], add_to is not None)
            elif add_to is None:
                out = with_bias(band, bias)
            elif cut == NO_CUT:
                out.add_(with_bias(band, bias))
            else:
                out = with_bias(band, bias).add_(out)
            del band
        if commit:
            history.reverse()
        return out

    def _taps(self, past: int, outputs: slice, stream: Stream) -> tuple[Tensor, Tensor]:
        """Weight and bias for a frame with `past` frames before it, of some outputs."""
        if past == 2 and outputs == EVERYTHING:
            # A view, which the stream keeps: in tiles, Python's time is what counts.
            if self not in stream.weights:
                stream.weights[self] = (self._laid_out(self.weight), self.bias)
            return stream.weights[self]
        # The last tap alone is the one case that copies: 5 MiB for 384 channels, and it has a third of the arithmetic.
        return self._laid_out(self.weight[outputs, :, 2 - past :]), self.bias[outputs]

    def _laid_out(self, weight: Tensor) -> Tensor:
        """Taps [O,I,t,kH,kW] as the convolution takes them: if flat [O,t*I,kH,kW]. A copy where some are left out."""
        if self.flat:
            return weight.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)
        return weight.contiguous(memory_format=torch.channels_last_3d)


def _conv(module: nn.Module) -> Conv:
    assert isinstance(module, Conv)
    return module


def _gamma(module: nn.Module) -> Gamma:
    assert isinstance(module, Gamma)
    return module


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), overwriting x; a pointwise shortcut where the channels change."""

    shortcut: Conv | None

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        first, last = Conv(inputs, outputs, (3, 3, 3), dtype), Conv(outputs, outputs, (3, 3, 3), dtype)
        norms = Gamma(inputs, 3, dtype), Gamma(outputs, 3, dtype)
        self.residual = nn.ModuleDict({"0": norms[0], "2": first, "3": norms[1], "6": last})
        self._parts = first, last, norms  # the same modules: asking for them by name takes 1 us each
        self.shortcut = Conv(inputs, outputs, (1, 1, 1), dtype) if inputs != outputs else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        first, last, norms = self._parts
        inner = first.causal(x, stream, norm=norms[0])
        if self.shortcut is not None:
            x = self.shortcut.pointwise(x)
        kept = stream.cut(self).of(x)
        out = last.causal(inner, stream, norm=norms[1], add_to=kept)
        if out is x or out is not kept:
            return out
        del inner
        return out.clone(memory_format=torch.channels_last_3d)


class AttentionBlock(nn.Module):
    """Attention among the positions of one frame, added to x in place."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = Gamma(channels, 2, dtype)
        self.to_qkv = Conv(channels, 3 * channels, (1, 1), dtype)
        self.proj = Conv(channels, channels, (1, 1), dtype)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        del stream  # no memory between frames
        tokens = positions(x)
        normed = new_frames(x, *x.shape[1:])
        self.norm.write(x, normed, silu=False)
        qkv = torch.addmm(self.to_qkv.bias, positions(normed), self.to_qkv.matrix())
        del normed
        attended = frame_attention(qkv)
        del qkv
        tokens.addmm_(attended, self.proj.matrix()).add_(self.proj.bias)
        return x


class Upsample(nn.Module):
    """Twice the height and width, half the channels; with `temporal`, two frames for every frame after the first."""

    time_conv: Conv | None

    def __init__(self, channels: int, temporal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(channels, channels // 2, (3, 3), dtype)})
        self.time_conv = Conv(channels, 2 * channels, (3, 1, 1), dtype) if temporal else None

    def parts(self, stream: Stream) -> tuple[int | None, ...]:
        """Which `part`s the frame that comes next has to be called with, in order."""
        return (None,) if self.time_conv is None or stream.starts(self) else (0, 1)

    def forward(self, x: Tensor, stream: Stream, part: int | None) -> Tensor:
        """One output frame. part 0 and 1 are the two frames of a temporal upsampling, None is the frame itself."""
        if part is not None and self.time_conv is not None:
            channels = x.shape[1]
            outputs = slice(part * channels, (part + 1) * channels)
            x = self.time_conv.causal(x, stream, outputs=outputs, commit=part == 1)
        return self._double(x, stream)

    def _double(self, x: Tensor, stream: Stream) -> Tensor:
        """Nearest neighbour and convolution, a band of rows at a time."""
        conv = _conv(self.resample["1"])
        _, channels, _, height, width = x.shape
        cut = stream.cut(conv)
        start, stop = cut.top, 2 * height - cut.bottom
        out = new_frames(x, conv.weight.shape[0], 1, stop - start, 2 * width - cut.left - cut.right)
        ranges = stream.bands(0, height, 4 * x.nbytes)
        whole = len(ranges) == 1
        for top, bottom in ranges:
            first, last = max(top - 1, 0), min(bottom + 1, height)
            doubled = new_frames(x, channels, 1, 2 * (last - first), 2 * width)
            rows = x[0, :, 0, first:last].permute(1, 2, 0)
            grid = doubled[0, :, 0].permute(1, 2, 0).view(last - first, 2, width, 2, channels)
            grid.copy_(rows[:, None, :, None, :])
            above, below = max(2 * top, start), min(2 * bottom, stop)
            sides = cut._replace(top=above - 2 * first, bottom=2 * last - below)
            operands = (doubled.squeeze(2), conv.weight) if conv.flat else (doubled, conv.weight.unsqueeze(2))
            band = stream.convolve(*operands, sides)
            del doubled, grid, operands
            if whole:
                torch.add(band, conv.bias.view(-1, 1, 1, 1), out=out)
            else:
                place_frame(band, conv.bias, out[..., above - start : below - start, :], False)
            del band
        return out


class Downsample(nn.Module):
    """Half the height and width; with `temporal`, one frame for every two after the first."""

    time_conv: Conv | None

    def __init__(self, channels: int, temporal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(channels, channels, (3, 3), dtype)})
        self.time_conv = Conv(channels, channels, (3, 1, 1), dtype) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor | None:
        """The output frame, or None where the second frame of a pair is still to come."""
        x = self._halve(x, stream)
        if self.time_conv is None or not stream.remember:
            return x
        if stream.starts(self):
            stream.frames[self] = [x.clone(memory_format=torch.channels_last_3d)]  # x is overwritten downstream
            return x
        held = stream.frames[self]
        held.append(x)
        if len(held) < 3:
            return None
        window = new_frames(x, x.shape[1], 3, *x.shape[3:])
        fill_window(held[2], held[:2], None, window, 0, 0)
        del held[:2]
        return conv3d(window, self.time_conv.weight, self.time_conv.bias, (2, 1, 1), (0, 0, 0))

    def _halve(self, x: Tensor, stream: Stream) -> Tensor:
        """Convolution with stride 2, padded by one at the right and bottom, a band of rows at a time.

        An odd extent is a tile that goes on: its last row or column stands where the padding would be.
        """
        conv = _conv(self.resample["1"])
        _, channels, _, height, width = x.shape
        out = new_frames(x, channels, 1, height // 2, width // 2)
        for top, bottom in stream.bands(0, height // 2, x.nbytes):
            first, last = 2 * top, min(2 * bottom + 1, height)
            padded = new_frames(x, channels, 1, 2 * (bottom - top) + 1, 2 * (width // 2) + 1)
            padded[..., : last - first, :width].copy_(x[..., first:last, :])
            padded[..., width:].zero_()
            padded[..., last - first :, :].zero_()
            band = conv3d(padded, conv.weight.unsqueeze(2), conv.bias, (1, 2, 2), (0, 0, 0))
            del padded
            out[..., top:bottom, :].copy_(band)
            del band
        return out


class LastConv(nn.Module):
    """norm, SiLU and the last temporal convolution, which remembers products instead of inputs.

    Output at t = W2 a[t] + W1 a[t-1] + W0 a[t-2]. With few outputs the three products of one frame (9 channels for RGB)
    are far smaller than the frame (96): 19 instead of 146 MiB at 480x832. One flat convolution gives all three.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.outputs = outputs
        self.add_module("0", Gamma(inputs, 3, dtype))
        self.add_module("2", Conv(inputs, outputs, (3, 3, 3), dtype))

    def forward(self, x: Tensor, stream: Stream, out: Tensor) -> None:
        """Write the output frame into out [outputs,H,W]."""
        if self not in stream.weights:
            stream.weights[self] = self._stacked()
        products = self._products(x, stream)
        past = stream.frames.setdefault(self, [])
        count = self.outputs
        out.copy_(products[0, 2 * count : 3 * count, 0])
        for age, old in enumerate(reversed(past), start=1):
            out.add_(old[0, (2 - age) * count : (3 - age) * count, 0])
        past.append(products)
        del past[:-2]

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """The three taps below each other, [3*outputs, I, 1, 3, 3], and the bias at the newest.

        Padded to a multiple of 4: cuDNN leaves channels_last (a 439 MiB workspace for RGB) for odd channel counts.
        """
        conv = _conv(self.get_submodule("2"))
        count, rows = self.outputs, -(-3 * self.outputs // 4) * 4
        shape = (rows, conv.weight.shape[1], 1, 3, 3)
        weight = torch.empty(
            shape, dtype=conv.weight.dtype, device=conv.weight.device, memory_format=torch.channels_last_3d
        ).zero_()
        bias = torch.zeros(rows, dtype=conv.bias.dtype, device=conv.bias.device)
        for tap in range(3):
            weight[tap * count : (tap + 1) * count].copy_(conv.weight[:, :, tap : tap + 1])
        bias[2 * count : 3 * count].copy_(conv.bias)
        return weight, bias

    def _products(self, x: Tensor, stream: Stream) -> Tensor:
        weight, bias = stream.weights[self]
        height, cut = x.shape[3], stream.cut(self)
        start, stop = cut.top, height - cut.bottom
        out = new_frames(x, weight.shape[0], 1, stop - start, x.shape[4] - cut.left - cut.right)
        for top, bottom in stream.bands(start, stop, x.nbytes):
            first, last = max(top - 1, 0), min(bottom + 1, height)
            activated = new_frames(x, x.shape[1], 1, last - first, x.shape[4])
            _gamma(self.get_submodule("0")).write(x[..., first:last, :], activated, silu=True)
            sides = cut._replace(top=top - first, bottom=last - bottom)
            band = stream.convolve(activated, weight, sides)
            del activated
            torch.add(band, bias.view(-1, 1, 1, 1), out=out[..., top - start : bottom - start, :])
            del band
        return out

"""What CUDA takes beside the results of the operations that foreign code calls: rules, and what is known of them to be only a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch

from wanvram.foreign.layouts import as_channels_last, suggests_channels_last
from wanvram.foreign.measured import MeasuredTable
from wanvram.simulate.convolutions import Convolution
from wanvram.simulate.gpus import GPU
from wanvram.simulate.libraries import BufferPlan, Libraries

__all__ = ["ForeignBuffers", "convolution_result"]

Arguments = tuple[Any, ...]
CHANNELS_LAST_BYTES = 131  # the commonest workspace of a convolution in channels_last


class Registered(NamedTuple):
    """What a user states of an operation: its result from its arguments, and bytes taken for the length of the call."""

    result: Callable[..., Any] | None
    taken: Callable[..., int]


class ForeignBuffers(Libraries):
    """As the simulated pipeline's, with PyTorch's own convolutions and norms, and what users register.

    ranged: names of operations whose workspace is a rule -> the largest one counted, bytes: it may be between none and this.
    """

    def __init__(
        self,
        gpu: GPU,
        registered: dict[str, Registered] | None = None,
        measured: MeasuredTable | None = None,
    ) -> None:
        super().__init__(gpu)
        self.measured = measured
        self.registered = registered or {}
        self.ranged: Counter[str] = Counter()
        # What one call in two dimensions may take more: half as much again, in one image VAE measured.
        self.above_bytes = 0
        stated = {name: entry.result for name, entry in self.registered.items() if entry.result is not None}
        self.results: dict[str, Callable[..., Any]] = {"aten.convolution.default": convolution_result} | stated
        self._planners |= {
            "aten.convolution.default": self._plain_convolution,
            "aten.native_group_norm.default": _group_norm,
            "aten._addmm_activation.default": self._planners["aten.addmm.default"],
        }

    def knows(self, name: str) -> bool:
        return name in self.registered or name in self._planners

    def plan(self, operation: str, args: Arguments) -> BufferPlan | None:
        entry = self.registered.get(operation)
        if entry is not None:
            return BufferPlan(during=(entry.taken(*args),))
        planner = self._planners.get(operation)
        return planner(args) if planner is not None else None

    def measured_plan(self, operation: str, args: Arguments, kwargs: dict[str, Any]) -> BufferPlan | None:
        """What was measured for such arguments on a real card; None where nothing was."""
        taken = None if self.measured is None else self.measured.taken(operation, args, kwargs)
        if taken is None:
            return None
        if operation != "aten.convolution.default":
            return BufferPlan(during=(taken,) if taken else ())
        x, weight = args[:2]
        copied = tuple(min(taken, nbytes) for nbytes in _copied(x, _in_channels_last(x, weight)))
        rest = taken - sum(copied)
        return BufferPlan(before=copied, during=(rest,) if rest else (), loads=("cudnn",))

    def _plain_convolution(self, args: Arguments) -> BufferPlan:
        """In channels_last as measured; else cuDNN converts all three to channels_last inside: input, output and weight."""
        x, weight, _, _, _, dilation, transposed, _, groups = args[:9]
        if not x.numel() or 1 < groups == x.shape[1]:  # depthwise: PyTorch's own kernels
            return BufferPlan()
        last = _in_channels_last(x, weight)
        copied, weights = _copied(x, last), _copied(weight, last)
        if last:
            plain = not transposed and groups == 1 and all(step == 1 for step in dilation)
            known = plain and x.dim() == 5 and x.shape[0] == 1
            taken = self.conv_workspace(Convolution.of(*args[:5])) if known else CHANNELS_LAST_BYTES
            return BufferPlan(copied, (*weights, taken) if taken else weights, loads=("cudnn",))
        output = prod(convolution_shape(*args[:9])) * x.itemsize
        taken = x.numel() * x.itemsize + output + weight.numel() * weight.itemsize
        kind = f"convolution {x.dim() - 2}d {str(x.dtype).removeprefix('torch.')} contiguous"
        self.ranged[kind] = max(self.ranged[kind], taken)
        if x.dim() == 4:
            self.above_bytes = max(self.above_bytes, taken // 2)
        return BufferPlan(copied, (*weights, taken), loads=("cudnn",))


def _group_norm(args: Arguments) -> BufferPlan:
    """Scale and shift of each channel, in float32 (group_norm_kernel.cu)."""
    nbytes = 4 * args[3] * args[4]
    return BufferPlan(during=(nbytes, nbytes))


def _in_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether cuDNN computes in it, and so gives its result: where the input or the weight suggests it."""
    return suggests_channels_last(x) or suggests_channels_last(weight)


def _copied(tensor: torch.Tensor, last: bool) -> tuple[int, ...]:
    """Bytes of the copy that lies as cuDNN computes; none where the tensor does."""
    fits = as_channels_last(tensor) if last else tensor.is_contiguous()
    return () if fits else (tensor.numel() * tensor.itemsize,)


def convolution_shape(
    x: torch.Tensor, weight: torch.Tensor, _bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> list[int]:
    """[N,O,...] of a convolution, or of a transposed one (rest: transposed, output_padding, groups)."""
    transposed, output_padding, groups = rest
    count = x.dim() - 2
    stride, padding, dilation = (list(v) * count if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    sizes = []
    for i in range(count):
        length, kernel = x.shape[2 + i], dilation[i] * (weight.shape[2 + i] - 1) + 1
        if transposed:
            extra = output_padding[i if len(output_padding) > 1 else 0]
            sizes.append((length - 1) * stride[i] - 2 * padding[i] + kernel + extra)
        else:
            sizes.append((length + 2 * padding[i] - kernel) // stride[i] + 1)
    return [x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], *sizes]


def convolution_result(*args: Any) -> torch.Tensor:
    """Channels_last where the input or the weight is, as cuDNN gives it; checked by PyTorch's own meta kernel."""
    x, weight = args[0], args[1]
    shape = convolution_shape(*args[:9])
    if min(shape) < 1:
        torch.ops.aten.convolution.default(*args)  # says what is wrong
    layout = torch.contiguous_format
    if _in_channels_last(x, weight):
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=x.dtype, device="meta", memory_format=layout)

"""The results of a simulated run's operations without PyTorch's meta kernels, most of which are Python: 50 to 500 us each.

The first of those also imports PyTorch's compiler and sympy, 1 to 5 s of a process. Only the result's shape, dtype and layout
matter, and for these operations they are known. The operations themselves, with every check, run in the tests on real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import ceil
from typing import Any

import torch

__all__ = ["Shortcut", "shortcut_of"]


# Arguments and named arguments -> the result; NotImplemented: not for these.
Shortcut = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def shortcut_of(operation: Any) -> Shortcut | None:
    """How to get the operation's result on meta tensors without the meta kernel; None: there is no such way."""
    name = str(operation)
    if name.startswith("wanvram.") and not operation._schema.returns:  # it changes its arguments
        return _of_first(lambda *_: None)
    return _SHORTCUTS.get(name)


def _of_first(result: Callable[..., Any]) -> Shortcut:
    """Where the first argument is a meta tensor."""
    return lambda args, kwargs: result(*args, **kwargs) if getattr(args[0], "is_meta", False) else NotImplemented


def _changed(changed: Any, *_: Any, **__: Any) -> Any:
    return changed


def _given(*_: Any, out: Any, **__: Any) -> Any:
    return out


# --- new tensors -------------------------------------------------------------------------------------------------------------


def _new(shape: Sequence[int], dtype: torch.dtype | None) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def _like(x: torch.Tensor, dtype: torch.dtype) -> Any:
    """Dense, dimensions in the order of x's, which is how PyTorch lays results out."""
    if x.is_contiguous():
        return _new(x.shape, dtype)
    # Of equal strides the later dimension lies closer: what has one element only has its neighbour's.
    order = sorted(range(x.dim()), key=lambda dim: (x.stride(dim), -dim))
    strides, step = [0] * x.dim(), 1
    for dim in order:
        strides[dim], step = step, step * max(x.shape[dim], 1)
    return torch.empty_strided(x.shape, strides, dtype=dtype, device="meta")


def _copy(x: torch.Tensor, *, memory_format: torch.memory_format | None = None, **options: Any) -> Any:
    """What clone and empty_like give."""
    if options.get("device") not in (None, x.device):
        return NotImplemented
    dtype = options.get("dtype") or x.dtype
    if memory_format in (None, torch.preserve_format):
        return _like(x, dtype)
    return torch.empty(x.shape, dtype=dtype, device="meta", memory_format=memory_format)


def _made(shape_of: Callable[..., Sequence[int]]) -> Shortcut:
    """An operation that makes a tensor out of numbers, if it is to be a meta tensor."""

    def result(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "meta":
            return NotImplemented
        return _new(shape_of(*args), kwargs.get("dtype"))

    return result


def _range(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    start, end = (0, *args) if len(args) == 1 else args
    if kwargs.get("dtype") is None and isinstance(start, int) and isinstance(end, int):
        kwargs = kwargs | {"dtype": torch.int64}
    return _made(lambda *_: [ceil(end - start)])(args, kwargs)


def _new_empty(x: torch.Tensor, size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    return NotImplemented if options.get("device") not in (None, x.device) else _new(size, dtype or x.dtype)


# --- elementwise -------------------------------------------------------------------------------------------------------------


def _combined(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Any:
    """Of tensors that are expanded to each other's shape: the first one's layout, or that of contiguous ones."""
    first, dimensions = tensors[0], max(x.dim() for x in tensors)
    sizes = zip(*(_padded(x.shape, dimensions) for x in tensors), strict=True)
    shape = [0 if 0 in together else max(together) for together in sizes]
    if list(first.shape) == shape and (first.is_contiguous() or 0 not in first.stride()):
        return _like(first, dtype)
    return _new(shape, dtype) if all(x.is_contiguous() for x in tensors) else NotImplemented


def _padded(shape: Sequence[int], dimensions: int) -> list[int]:
    return [1] * (dimensions - len(shape)) + list(shape)


def _elementwise(*operands: Any, whole: bool = False, **options: Any) -> Any:
    """Tensors and numbers of one kind: floating point, of which the widest is taken, or if `whole` integers of one dtype."""
    tensors = [x for x in operands if isinstance(x, torch.Tensor)]
    numbers = [x for x in operands if not isinstance(x, torch.Tensor)]
    dtypes = {x.dtype for x in tensors if x.dim()} or {x.dtype for x in tensors}
    floating = all(x.dtype.is_floating_point for x in tensors)
    integers = whole and len(dtypes) == 1 and not any(x.dtype.is_floating_point for x in tensors)
    numeric = all(isinstance(x, (int, float) if floating else int) for x in numbers)
    if options.keys() - {"alpha", "approximate"} or not all(x.is_meta for x in tensors):
        return NotImplemented
    return (
        _combined(tensors, reduce(torch.promote_types, dtypes))
        if (floating or integers) and numeric
        else NotImplemented
    )


def _integers_too(*operands: Any, **options: Any) -> Any:
    return _elementwise(*operands, whole=True, **options)


def _summed(x: torch.Tensor, y: Any, *, out: torch.Tensor, **_: Any) -> Any:
    """Into a tensor that has the result's size already."""
    same = isinstance(y, torch.Tensor) and x.shape == out.shape and y.dim() <= x.dim()
    fits = same and all(n in (1, m) for n, m in zip(_padded(y.shape, x.dim()), x.shape, strict=True))
    return out if fits else NotImplemented


def _compared(x: torch.Tensor, number: Any) -> Any:
    return _like(x, torch.bool) if isinstance(number, (int, float)) else NotImplemented


def _chosen(condition: torch.Tensor, x: Any, y: Any) -> Any:
    if not x.is_meta or not y.is_meta or x.dtype != y.dtype:
        return NotImplemented
    return _combined((condition, x, y), x.dtype)


# --- sums, products, parts ---------------------------------------------------------------------------------------------------


def _reduced(x: torch.Tensor, dims: Sequence[int] | None, keepdim: bool = False, **options: Any) -> Any:
    if not dims or options or not x.is_contiguous() or not x.dtype.is_floating_point:
        return NotImplemented
    gone = {dim % x.dim() for dim in dims}
    kept = [1 if dim in gone else size for dim, size in enumerate(x.shape) if keepdim or dim not in gone]
    return _new(kept, x.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> Any:
    return _new((*a.shape[:-1], b.shape[-1]), a.dtype)


def _attention(q: torch.Tensor, _: torch.Tensor, v: torch.Tensor, *__: Any) -> Any:
    return _new((q.shape[0], q.shape[1], v.shape[2]), q.dtype)


def _softmax(x: torch.Tensor, _: int, half_to_float: bool) -> Any:
    return NotImplemented if half_to_float or not x.is_contiguous() else _new(x.shape, x.dtype)


def _selected(x: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    shape = list(x.shape)
    shape[dim] = index.numel()
    return _new(shape, x.dtype)


def _indexed(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    (index, *others) = indices
    if others or index is None or index.dtype == torch.bool or not x.is_contiguous() or not index.is_contiguous():
        return NotImplemented
    return _new((*index.shape, *x.shape[1:]), x.dtype)


def _joined(args: tuple[Any, ...], kwargs: dict[str, Any], *, stacked: bool) -> Any:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    first = tensors[0]
    (layout, *others) = {_layout(x) for x in tensors}
    alike = all(x.is_meta and x.dtype == first.dtype and x.dim() == first.dim() for x in tensors)
    if layout is None or others or not alike or (stacked and layout != torch.contiguous_format):
        return NotImplemented
    shape = list(first.shape)
    if stacked:
        shape.insert(dim % (first.dim() + 1), len(tensors))
    else:
        shape[dim] = sum(x.shape[dim] for x in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta", memory_format=layout)


def _layout(x: torch.Tensor) -> torch.memory_format | None:
    """The memory format that PyTorch's kernels keep; None where that is not plain."""
    if x.is_contiguous() or x.dim() <= 3:  # three dimensions have no channels_last
        return torch.contiguous_format
    if x.dim() > 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    return (
        torch.channels_last if x.stride(0) >= x.stride(2) else torch.contiguous_format
    )  # a single picture's may be anything


def _normalised(x: torch.Tensor, size: Sequence[int], *_: Any) -> Any:
    """Of a layer norm: the result, and a mean and a deviation for each row."""
    if not x.is_contiguous():
        return NotImplemented
    rows = [*x.shape[: -len(size)], *[1] * len(size)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return _new(x.shape, x.dtype), _new(rows, wide), _new(rows, wide)


def _resized(x: torch.Tensor, size: Sequence[int], *_: Any) -> Any:
    layout = _layout(x)
    if layout is None:
        return NotImplemented
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device="meta", memory_format=layout)


def _viewed(x: torch.Tensor, shape: Sequence[int]) -> Any:
    return x.view(shape)


_IN_PLACE = (
    *("copy_.default", "add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "zero_.default", "exp_.default"),
    *("clamp_.default", "uniform_.default", "addmm_.default"),
)
_UNARY = ("reciprocal", "rsqrt", "exp", "cos", "sin", "silu", "gelu")
_OF_INTEGERS_TOO = ("abs.default", "add.Tensor", "sub.Tensor", "mul.Tensor", "remainder.Scalar", "floor_divide.default")
_REDUCTIONS = ("amax.default", "sum.dim_IntList", "mean.dim")
_FACTORIES = ("ones.default", "zeros.default", "randn.generator")
_RESULTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_IN_PLACE, _changed),
    **dict.fromkeys(("mm.out", "addmm.out"), _given),
    **dict.fromkeys((f"{name}.default" for name in _UNARY), _elementwise),
    **dict.fromkeys(("div.Tensor", "pow.Tensor_Scalar"), _elementwise),
    **dict.fromkeys(_OF_INTEGERS_TOO, _integers_too),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(("gt.Scalar", "ge.Scalar"), _compared),
    **dict.fromkeys(("clone.default", "empty_like.default"), _copy),
    **dict.fromkeys(("mm.default", "bmm.default"), _product),
    "add.out": _summed,
    "addmm.default": lambda _, a, b, **__: _product(a, b),
    "where.self": _chosen,
    "_softmax.default": _softmax,
    "index_select.default": _selected,
    "index.Tensor": _indexed,
    "native_layer_norm.default": _normalised,
    "upsample_bicubic2d.default": _resized,
    "new_empty.default": _new_empty,
    "_unsafe_view.default": _viewed,
}
_SHORTCUTS: dict[str, Shortcut] = {
    **{f"aten.{name}": _of_first(result) for name, result in _RESULTS.items()},
    **{f"aten.{name}": _made(lambda size, **_: size) for name in _FACTORIES},
    "aten.pow.Scalar": lambda args, kwargs: _elementwise(*args, **kwargs),
    "aten.arange.default": _range,
    "aten.arange.start": _range,
    "aten.cat.default": lambda args, kwargs: _joined(args, kwargs, stacked=False),
    "aten.stack.default": lambda args, kwargs: _joined(args, kwargs, stacked=True),
    "wanvram.linear_gelu.default": _of_first(lambda a, b, *_: _product(a, b)),
    "wanvram.attention.default": _of_first(_attention),
    "wanvram.layer_norm_modulate.default": _of_first(lambda x, *rest: _new(x.shape, rest[4])),
}

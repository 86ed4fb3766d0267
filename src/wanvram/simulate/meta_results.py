"""The results of a simulated run's operations without PyTorch's meta kernels, most of which are Python: 50 to 500 us each.

The first of those also imports PyTorch's compiler and sympy, 1 to 5 s of a process. Only the result's shape, dtype and layout
matter, and for what our own models ask they are known; whatever is unusual is left to PyTorch, which also refuses what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import ceil
from types import NoneType
from typing import Any

import torch

__all__ = ["Shortcut", "shortcut_of"]


# Arguments and named arguments -> the result; NotImplemented: not for these.
Shortcut = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Shape = Sequence[int]
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shortcut_of(operation: Any) -> Shortcut | None:
    """How to get the operation's result on meta tensors without the meta kernel; None: there is no such way."""
    name = str(operation)
    if name.startswith("wanvram.") and not operation._schema.returns:  # it changes its arguments
        return _of_first(lambda *_: None)
    return _SHORTCUTS.get(name)


def _of_first(result: Callable[..., Any]) -> Shortcut:
    """Where the first argument is a meta tensor."""
    return lambda args, kwargs: result(*args, **kwargs) if getattr(args[0], "is_meta", False) else NotImplemented


# --- changed in place --------------------------------------------------------------------------------------------------------


def _changed(x: torch.Tensor, *_: Any, **__: Any) -> Any:
    return x if x.dtype.is_floating_point else NotImplemented


def _clamped(x: torch.Tensor, least: float | None = None, most: float | None = None) -> Any:
    known = all(isinstance(bound, (int, float, NoneType)) for bound in (least, most)) and (least, most) != (None, None)
    return _changed(x) if known else NotImplemented


def _zeroed(x: torch.Tensor) -> Any:
    return x


def _updated(x: torch.Tensor, y: Any, *_: Any, **__: Any) -> Any:
    """By a number, or by a tensor that expands to it."""
    if isinstance(y, (int, float)):
        return x if x.dtype.is_floating_point or (x.dtype in INTEGERS and isinstance(y, int)) else NotImplemented
    if not isinstance(y, torch.Tensor) or not torch.can_cast(torch.promote_types(x.dtype, y.dtype), x.dtype):
        return NotImplemented
    return x if _expands(y.shape, x.shape) else NotImplemented


def _overwritten(x: torch.Tensor, y: torch.Tensor, *_: Any) -> Any:
    return x if _expands(y.shape, x.shape) and (x.dtype.is_complex or not y.dtype.is_complex) else NotImplemented


def _lessened(x: torch.Tensor, y: Any, **_: Any) -> Any:
    """By a difference or a quotient, which not all dtypes have."""
    return _updated(x, y) if x.dtype.is_floating_point and getattr(y, "dtype", None) != torch.bool else NotImplemented


def _summed(x: torch.Tensor, y: Any, *, out: torch.Tensor, **_: Any) -> Any:
    """Into a tensor that has the result's size already."""
    same = isinstance(y, torch.Tensor) and x.shape == out.shape and x.dtype == y.dtype == out.dtype
    return out if same and _expands(y.shape, x.shape) else NotImplemented


def _expands(shape: Shape, into: Shape) -> bool:
    return len(shape) <= len(into) and all(n in (1, m) for n, m in zip(_padded(shape, len(into)), into, strict=True))


def _padded(shape: Shape, dimensions: int) -> list[int]:
    return [1] * (dimensions - len(shape)) + list(shape)


# --- new tensors -------------------------------------------------------------------------------------------------------------


def _new(shape: Shape, dtype: torch.dtype | None) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def _like(x: torch.Tensor, dtype: torch.dtype) -> Any:
    """Dense, dimensions in the order of x's, which is how PyTorch lays results out."""
    if x.is_contiguous():
        return _new(x.shape, dtype)
    if 0 in x.stride():
        return NotImplemented
    # Of equal strides the later dimension lies closer: what has one element only has its neighbour's.
    order = sorted(range(x.dim()), key=lambda dim: (x.stride(dim), -dim))
    strides, step = [0] * x.dim(), 1
    for dim in order:
        strides[dim], step = step, step * max(x.shape[dim], 1)
    return torch.empty_strided(x.shape, strides, dtype=dtype, device="meta")


def _copy(x: torch.Tensor, *, memory_format: torch.memory_format | None = None, **options: Any) -> Any:
    """What clone and empty_like give."""
    if _elsewhere(options, x.device):
        return NotImplemented
    dtype = options.get("dtype") or x.dtype
    if memory_format in (None, torch.preserve_format):
        return _like(x, dtype)
    return torch.empty(x.shape, dtype=dtype, device="meta", memory_format=memory_format)


def _elsewhere(options: dict[str, Any], here: torch.device | None) -> bool:
    return options.get("device") not in (None, here) or options.get("layout") not in (None, torch.strided)


def _made(shape_of: Callable[..., Shape]) -> Shortcut:
    """An operation that makes a tensor out of numbers, if it is to be a meta tensor."""

    def result(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        if device is None or torch.device(device).type != "meta" or _elsewhere(kwargs, device) or dtype is torch.bool:
            return NotImplemented
        return _new(shape_of(*args), dtype)

    return result


def _drawn(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return NotImplemented if kwargs.get("dtype") in INTEGERS else _made(lambda size: size)(args, kwargs)


def _range(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    start, end = (0, *args) if len(args) == 1 else args
    dtype = kwargs.get("dtype")
    whole = isinstance(start, int) and isinstance(end, int)
    if end < start or (dtype in INTEGERS and not whole):
        return NotImplemented
    kwargs = kwargs | {"dtype": torch.int64 if dtype is None and whole else dtype}
    return _made(lambda *_: [ceil(end - start)])(args, kwargs)


def _new_empty(x: torch.Tensor, size: Shape, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    return NotImplemented if _elsewhere(options, x.device) else _new(size, dtype or x.dtype)


# --- elementwise -------------------------------------------------------------------------------------------------------------


def _combined(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Any:
    """Of tensors that are expanded to each other's shape: the first one's layout, or that of contiguous ones."""
    first, dimensions = tensors[0], max(x.dim() for x in tensors)
    shape = []
    for sizes in zip(*(_padded(x.shape, dimensions) for x in tensors), strict=True):
        if len({*sizes} - {1}) > 1:
            return NotImplemented
        shape.append(0 if 0 in sizes else max(sizes))
    if list(first.shape) == shape:
        return _like(first, dtype)
    return _new(shape, dtype) if all(x.is_contiguous() for x in tensors) else NotImplemented


def _elementwise(*operands: Any, whole: bool = False, alpha: float = 1, approximate: str = "none") -> Any:
    """Tensors and numbers of one kind: floating point, of which the widest is taken, or if `whole` integers of one dtype."""
    tensors = [x for x in operands if isinstance(x, torch.Tensor)]
    numbers = [alpha, *(x for x in operands if not isinstance(x, torch.Tensor))]
    dtypes = {x.dtype for x in tensors}
    floating = all(dtype.is_floating_point for dtype in dtypes)
    integers = whole and len(dtypes) == 1 and dtypes <= {*INTEGERS}
    numeric = all(isinstance(x, (int, float) if floating else int) for x in numbers)
    known = approximate in ("none", "tanh") and all(x.is_meta for x in tensors)
    if not known or not numeric or not (floating or integers):
        return NotImplemented
    return _combined(tensors, reduce(torch.promote_types, {x.dtype for x in tensors if x.dim()} or dtypes))


def _integers_too(*operands: Any, **options: Any) -> Any:
    return _elementwise(*operands, whole=True, **options)


def _by_number(x: torch.Tensor, number: Any) -> Any:
    return NotImplemented if isinstance(number, torch.Tensor) else _integers_too(x, number)


def _compared(x: torch.Tensor, number: Any) -> Any:
    return _like(x, torch.bool) if isinstance(number, (int, float)) and not x.dtype.is_complex else NotImplemented


def _chosen(condition: torch.Tensor, x: Any, y: Any) -> Any:
    if condition.dtype != torch.bool or not x.is_meta or not y.is_meta or x.dtype != y.dtype:
        return NotImplemented
    return _combined((condition, x, y), x.dtype)


# --- sums, products, parts ---------------------------------------------------------------------------------------------------


def _reduced(x: torch.Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **options: Any) -> Any:
    plain = x.dim() and x.is_contiguous() and x.dtype.is_floating_point and not options
    if not plain or not dims or not all(-x.dim() <= dim < x.dim() for dim in dims) or 0 in x.shape:
        return NotImplemented
    gone = {dim % x.dim() for dim in dims}
    kept = [1 if dim in gone else size for dim, size in enumerate(x.shape) if keepdim or dim not in gone]
    return _new(kept, x.dtype) if len(gone) == len(dims) else NotImplemented


def _product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
    """Of matrices, or of as many pairs of them."""
    alike = a.dtype == b.dtype and a.dim() == b.dim() and a.shape[:-2] == b.shape[:-2]
    if not alike or a.dim() < 2 or a.shape[-1] != b.shape[-2]:
        return NotImplemented
    shape = (*a.shape[:-1], b.shape[-1])
    if out is None:
        return _new(shape, a.dtype)
    return out if out.shape == shape and out.dtype == a.dtype else NotImplemented


def _added_product(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out: Any = None, **_: Any) -> Any:
    result = _product(a, b, out=out)
    return result if _fits(bias, result) else NotImplemented


def _onto_product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **_: Any) -> Any:
    return _product(a, b, out=x)


def _fits(bias: torch.Tensor, result: Any) -> bool:
    return result is not NotImplemented and bias.dtype == result.dtype and _expands(bias.shape, result.shape)


def _attention(q: torch.Tensor, _: torch.Tensor, v: torch.Tensor, *__: Any) -> Any:
    return _new((q.shape[0], q.shape[1], v.shape[2]), q.dtype)


def _softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> Any:
    plain = x.is_contiguous() and x.dtype.is_floating_point and -x.dim() <= dim < x.dim()
    return _new(x.shape, x.dtype) if plain and not half_to_float else NotImplemented


def _selected(x: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    if index.dim() != 1 or index.dtype not in INTEGERS[:2] or not -x.dim() <= dim < x.dim():
        return NotImplemented
    shape = list(x.shape)
    shape[dim] = index.numel()
    return _new(shape, x.dtype)


def _indexed(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    (index, *others) = indices
    if others or index is None or index.dtype not in INTEGERS[:2] or not x.is_contiguous() or not index.is_contiguous():
        return NotImplemented
    return _new((*index.shape, *x.shape[1:]), x.dtype) if x.dim() and x.shape[0] else NotImplemented


def _joined(args: tuple[Any, ...], kwargs: dict[str, Any], *, stacked: bool) -> Any:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    first = tensors[0]
    (layout, *others) = {_layout(x) for x in tensors}
    room, dim = first.dim() + stacked, dim + (first.dim() + stacked if dim < 0 else 0)
    alike = all(x.is_meta and x.dtype == first.dtype and x.dim() == first.dim() for x in tensors)
    if layout is None or others or not alike or not 0 <= dim < room or (stacked and layout != torch.contiguous_format):
        return NotImplemented
    shape = list(first.shape)
    if not stacked:
        shape[dim] = sum(x.shape[dim] for x in tensors)
    if any(
        n != m for x in tensors for at, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if stacked or at != dim
    ):
        return NotImplemented
    if stacked:
        shape.insert(dim, len(tensors))
    return torch.empty(shape, dtype=first.dtype, device="meta", memory_format=layout)


def _layout(x: torch.Tensor) -> torch.memory_format | None:
    """The memory format that PyTorch's kernels keep, as they read it off the strides; None where that is not plain."""
    if x.dim() > 4 and not x.is_contiguous():
        return None
    if x.dim() != 4 or 0 in x.shape:
        return torch.contiguous_format
    least = 0
    for dim in (1, 3, 2, 0):
        if x.stride(dim) < max(least, 1) or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = x.stride(dim) * x.shape[dim]
    return torch.channels_last


def _normalised(x: torch.Tensor, size: Shape, weight: Any, bias: Any, _: float) -> Any:
    """Of a layer norm: the result, and a mean and a deviation for each row."""
    if any(part is not None and part.shape != x.shape[x.dim() - len(size) :] for part in (weight, bias)) or not size:
        return NotImplemented
    if not x.is_contiguous() or not x.dtype.is_floating_point or list(x.shape[x.dim() - len(size) :]) != list(size):
        return NotImplemented
    rows = [*x.shape[: -len(size)], *[1] * len(size)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return _new(x.shape, x.dtype), _new(rows, wide), _new(rows, wide)


def _resized(x: torch.Tensor, size: Shape, *_: Any) -> Any:
    layout = _layout(x)
    if layout is None or x.dim() != 4 or len(size) != 2 or 0 in size or not x.dtype.is_floating_point or 0 in x.shape:
        return NotImplemented
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device="meta", memory_format=layout)


def _viewed(x: torch.Tensor, shape: Shape) -> Any:
    return x.view(shape)


_UNARY = ("reciprocal", "rsqrt", "exp", "cos", "sin", "silu", "gelu")
_OF_INTEGERS_TOO = ("abs.default", "add.Tensor", "sub.Tensor", "mul.Tensor")
_REDUCTIONS = ("amax.default", "sum.dim_IntList", "mean.dim")
_FACTORIES = ("ones.default", "zeros.default")
_RESULTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("exp_.default", "uniform_.default"), _changed),
    "copy_.default": _overwritten,
    **dict.fromkeys(("add_.Tensor", "mul_.Tensor"), _updated),
    **dict.fromkeys(("sub_.Tensor", "div_.Tensor"), _lessened),
    **dict.fromkeys((f"{name}.default" for name in _UNARY), _elementwise),
    **dict.fromkeys(("div.Tensor", "pow.Tensor_Scalar"), _elementwise),
    **dict.fromkeys(_OF_INTEGERS_TOO, _integers_too),
    **dict.fromkeys(("remainder.Scalar", "floor_divide.default"), _by_number),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(("gt.Scalar", "ge.Scalar"), _compared),
    **dict.fromkeys(("clone.default", "empty_like.default"), _copy),
    **dict.fromkeys(("mm.default", "bmm.default", "mm.out"), _product),
    **dict.fromkeys(("addmm.default", "addmm.out"), _added_product),
    "zero_.default": _zeroed,
    "clamp_.default": _clamped,
    "addmm_.default": _onto_product,
    "add.out": _summed,
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
    "aten.randn.generator": _drawn,
    "aten.pow.Scalar": lambda args, kwargs: _elementwise(*args, **kwargs),
    "aten.arange.default": _range,
    "aten.arange.start": _range,
    "aten.cat.default": lambda args, kwargs: _joined(args, kwargs, stacked=False),
    "aten.stack.default": lambda args, kwargs: _joined(args, kwargs, stacked=True),
    "wanvram.linear_gelu.default": _of_first(lambda a, b, *_: _product(a, b)),
    "wanvram.attention.default": _of_first(_attention),
    "wanvram.layer_norm_modulate.default": _of_first(lambda x, *rest: _new(x.shape, rest[4])),
}

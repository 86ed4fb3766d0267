"""Results made without PyTorch's meta kernels are what those would make, and a simulation imports no compiler for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from wanvram.simulate.meta_results import shortcut_of

aten = torch.ops.aten
F32, F16, BF16, F64, I64 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def frame(channels: int, rows: int, columns: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """As the VAE's frames lie in memory."""
    shape = (1, channels, 1, rows, columns)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last_3d)


def part(channels: int = 4) -> torch.Tensor:
    """What a tile keeps of a frame: neither dense nor in the usual order."""
    return frame(channels, 9, 7)[..., 1:8, 2:6]


def pixels(size: int = 6) -> torch.Tensor:
    return torch.empty((1, 3, size, 8), device="meta", memory_format=torch.channels_last)


def calls() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    for x in (
        meta(5, 6),
        meta(5, 6, dtype=BF16),
        meta(7, dtype=F64),
        meta(3, 4).t(),
        frame(4, 3, 5),
        part(),
        meta(0, 3),
    ):
        for operation in (aten.exp, aten.cos, aten.sin, aten.silu, aten.gelu, aten.rsqrt, aten.reciprocal, aten.abs):
            yield operation.default, (x,), {}
        yield aten.clone.default, (x,), {}
        yield aten.clone.default, (x,), {"memory_format": torch.contiguous_format}
        yield aten.empty_like.default, (x,), {"dtype": F16}
        yield aten.new_empty.default, (x, [2, 3]), {}
        yield aten.new_empty.default, (x, [2, 3]), {"dtype": I64}
        yield aten.pow.Tensor_Scalar, (x, 2), {}
        yield aten.pow.Scalar, (10000.0, x), {}
        yield aten.gt.Scalar, (x, 0), {}
        for operation in (aten.add, aten.sub, aten.mul, aten.div):
            yield operation.Tensor, (x, 3), {}
            yield operation.Tensor, (x, 0.5), {}
            yield operation.Tensor, (x, x), {}
            yield operation.Tensor, (x, meta(dtype=x.dtype)), {}
        for operation in (aten.exp_.default, aten.zero_.default):
            yield operation, (x,), {}
        yield aten.clamp_.default, (x, -1.0, 1.0), {}
        yield aten.uniform_.default, (x, -1.0, 1.0), {}
    yield aten.clone.default, (part(),), {"memory_format": torch.channels_last_3d}
    for x, y in (
        (frame(4, 3, 5), meta(4, 1, 1, 1)),
        (part(), meta(4, 1, 1, 1)),
        (meta(21, 1), meta(22)),
        (meta(1, 8, dtype=BF16), meta(1, 1)),
        (meta(4, 8), meta(4, 8, dtype=F16)),
        (meta(4, 1).expand(4, 6), meta(4, 6)),
        (meta(1, 5), meta(4, 1)),
        (meta(5, 6), meta(5, 1)),
        (meta(3, 1, dtype=I64), meta(1, 3, dtype=I64)),
        (meta(), meta(2, 3, dtype=F16)),
    ):
        for operation in (aten.add, aten.sub, aten.mul):
            yield operation.Tensor, (x, y), {}
        if x.is_floating_point():
            yield aten.div.Tensor, (x, y), {}
    for x, y in (
        (meta(4, 8, dtype=F16), meta(4, 8, dtype=torch.float8_e4m3fn)),
        (meta(4, 8, dtype=F16), meta(8)),
        (meta(4, 8, dtype=I64), meta(4, 1, dtype=torch.bool)),
        (part(), part()),
    ):
        yield aten.copy_.default, (x, y), {}
        if y.dtype != torch.float8_e4m3fn:
            yield from ((operation, (x, y), {}) for operation in (aten.add_.Tensor, aten.mul_.Tensor))
            yield aten.add_.Tensor, (x, 2), {}
        if x.is_floating_point() and y.dtype != torch.float8_e4m3fn:
            yield from ((operation, (x, y), {}) for operation in (aten.sub_.Tensor, aten.div_.Tensor))
    yield aten.add.Tensor, (meta(2, 3), meta(2, 3)), {"alpha": 2}
    yield aten.add.out, (part(), meta(4, 1, 1, 1)), {"out": frame(4, 7, 4)}
    for x in (meta(4, 4, dtype=I64), meta(1, 1, dtype=I64)):
        yield from ((operation, (x, 2), {}) for operation in (aten.remainder.Scalar, aten.floor_divide.default))
        yield from ((operation, (x, 1), {}) for operation in (aten.ge.Scalar, aten.gt.Scalar))
        yield aten.abs.default, (x,), {}
        yield aten.add.Tensor, (x, 1), {}
        yield aten.where.self, (x.to(torch.bool), x, meta(dtype=I64)), {}
    yield aten.where.self, (meta(9, 1, dtype=torch.bool), meta(9, 1), meta()), {}
    for operation in (aten.amax.default, aten.sum.dim_IntList, aten.mean.dim):
        for dims in ([1], [-1], [0, 2]):
            yield operation, (meta(2, 3, 4), dims), {}
            yield operation, (meta(2, 3, 4, dtype=BF16), dims, True), {}
    yield aten.mm.default, (meta(2, 3), meta(3, 4)), {}
    yield aten.mm.out, (meta(2, 3), meta(3, 4)), {"out": meta(2, 4)}
    yield aten.bmm.default, (meta(5, 2, 3), meta(5, 3, 4)), {}
    yield aten.addmm.default, (meta(4), meta(2, 3, dtype=F32), meta(3, 4)), {}
    yield aten.addmm_.default, (meta(2, 4), meta(2, 3), meta(3, 4)), {}
    yield aten._softmax.default, (meta(2, 3, 4, dtype=F16), -1, False), {}
    yield aten.index_select.default, (meta(4, 6), 1, meta(9, dtype=I64)), {}
    yield aten.index.Tensor, (meta(4, 6), [meta(9, dtype=I64)]), {}
    yield aten.native_layer_norm.default, (meta(2, 3, 8, dtype=F16), [8], None, None, 1e-5), {}
    yield aten.native_layer_norm.default, (meta(3, 8), [8], meta(8), meta(8), 1e-5), {}
    yield aten._unsafe_view.default, (meta(4, 6), [24]), {}
    for x in (
        meta(1, 3, 6, 8),
        pixels(),
        pixels()[:, :, ::2],
        torch.empty_strided((1, 3, 6, 8), (3, 1, 24, 3), device="meta"),
    ):
        yield aten.upsample_bicubic2d.default, (x, [4, 5], False), {}
    for tensors in (
        [meta(2, 3), meta(4, 3)],
        [pixels(), pixels()],
        [meta(2, 1, 4).expand(2, 1, 4), meta(2, 5, 4)[:, ::2]],
    ):
        yield aten.cat.default, (tensors, tensors[0].dim() - 2), {}
        yield aten.stack.default, ([tensors[0], tensors[0]], 1), {}
    for given in ({}, {"dtype": F16}):
        where = {"device": torch.device("meta"), "pin_memory": False} | given
        yield aten.ones.default, ([2, 3],), where
        yield aten.zeros.default, ([2, 3],), where
        yield aten.randn.generator, ([2, 3],), where | {"generator": None}
        yield aten.arange.default, (5,), where
        yield aten.arange.start, (2, 9), where
        yield aten.arange.start, (0.5, 3), where


def described(value: Any) -> Any:
    """Shape, strides of dimensions with more than one element, dtype, bytes. Whatever an argument is changed into is itself."""
    if isinstance(value, tuple):
        return [described(part) for part in value]
    strides = [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1 and value.numel()]
    return value.shape, strides, value.dtype, value.device, value.untyped_storage().nbytes()


@pytest.mark.parametrize(("operation", "args", "kwargs"), [*calls()], ids=str)
def test_a_result_made_without_the_meta_kernel_is_the_meta_kernels(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    shortcut = shortcut_of(operation)
    assert shortcut is not None
    found = shortcut(args, kwargs)
    if found is NotImplemented:
        return
    expected = operation(*args, **kwargs)
    assert described(found) == described(expected)
    for given in (*args, kwargs.get("out")):
        assert (found is given) == (expected is given)


def test_what_a_run_is_made_of_takes_the_short_way() -> None:
    """Else the cases above would pass where nothing is left of it."""
    taken = {
        str(operation)
        for operation, args, kwargs in calls()
        if shortcut_of(operation)(args, kwargs) is not NotImplemented
    }
    assert taken == {str(operation) for operation, *_ in calls()}


@pytest.mark.parametrize(
    ("operation", "args", "kwargs"),
    [
        (aten.exp.default, (torch.ones(2),), {}),
        (aten.add.Tensor, (torch.ones(2), 1), {}),
        (aten.add.Tensor, (meta(2, dtype=I64), 0.5), {}),
        (aten.add.Tensor, (meta(2), torch.ones(2)), {}),
        (aten.div.Tensor, (meta(2, dtype=I64), 2), {}),
        (aten.ones.default, ([2],), {"device": torch.device("cpu")}),
        (aten.ones.default, ([2],), {}),
        (aten.empty_like.default, (meta(2),), {"device": torch.device("cpu")}),
        (aten.sum.dim_IntList, (meta(2, dtype=I64), [0]), {}),
        (aten.add.out, (meta(2, 3), meta(3)), {"out": meta(0)}),
        (aten._softmax.default, (meta(2, dtype=F16), 0, True), {}),
        (aten.index.Tensor, (meta(4, 6), [None, meta(9, dtype=I64)]), {}),
        (aten.where.self, (meta(2, dtype=torch.bool), meta(2), meta(2, dtype=F16)), {}),
        (aten.add.Tensor, (meta(3), meta(4)), {}),
        (aten.add_.Tensor, (meta(3), meta(2, 3)), {}),
        (aten.add.Tensor, (meta(3, dtype=torch.bool), 1), {}),
        (aten.abs.default, (meta(3, dtype=torch.complex64),), {}),
        (aten.clone.default, (meta(2, 1).expand(2, 5),), {}),
        (aten.mm.default, (meta(2, 3), meta(4, 2)), {}),
        (aten.addmm.default, (meta(3), meta(2, 3), meta(3, 4)), {}),
        (aten.mm.out, (meta(2, 3), meta(3, 4)), {"out": meta(4, 2)}),
        (aten.cat.default, ([meta(2, 3), meta(2, 4)], 0), {}),
        (aten.sum.dim_IntList, (meta(2, 3), [2]), {}),
        (aten.amax.default, (meta(), [0]), {}),
        (aten.div_.Tensor, (meta(2, dtype=I64), 2), {}),
        (aten.native_layer_norm.default, (meta(2, 8), [4], None, None, 1e-5), {}),
        (aten.arange.start, (5, 2), {"device": torch.device("meta")}),
        (aten.ones.default, ([2],), {"device": torch.device("meta"), "layout": torch.sparse_coo}),
    ],
    ids=str,
)
def test_what_is_not_known_is_left_to_pytorch(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    shortcut = shortcut_of(operation)
    assert shortcut is not None
    assert shortcut(args, kwargs) is NotImplemented


@pytest.mark.parametrize("flags", ["--task i2v-14B --vae_tile 30", "--task t2v-1.3B --t5_cpu --product_precision fp8"])
def test_a_simulated_run_imports_no_compiler(flags: str) -> None:
    """PyTorch's meta kernels in Python would: 1 to 5 s of every command that predicts."""
    words = [
        "estimate",
        "--size",
        "832*480",
        "--frame_num",
        "5",
        "--precision",
        "bf16",
        "--gpu",
        "h200",
        *flags.split(),
    ]
    code = (
        "import sys; from wanvram.cli.main import main; code = main(sys.argv[1:]); "
        "assert code == 0; print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr

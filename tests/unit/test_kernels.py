"""Fused operations: reference against float64 formulas, fake against real layout, Triton against reference on a GPU."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from wanvram.kernels import channel_norm, elementwise, merge, scaled_products
from wanvram.kernels.elementwise import (
    add_,
    gated_add_,
    gelu_tanh_,
    inverse_rms,
    layer_norm_modulate,
    linear_gelu,
    rms_norm_,
    rms_norm_rope_,
    scaled_rope_,
)
from wanvram.kernels.merge import merge_attention_
from wanvram.kernels.operation import Operation
from wanvram.kernels.scaled_attention import attention, attention_with_sums

EPS = 1e-6
HEADS = 4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device=device, dtype=dtype)


def tables(rows: int, pairs: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    angle = randn(rows, pairs, seed=5).to(device) * 3
    return angle.cos(), angle.sin()


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert (actual.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


def rms64(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def rope64(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    pairs = torch.view_as_complex(x.double().reshape(x.shape[0], heads, -1, 2).contiguous())
    turned = pairs * torch.complex(cos.double(), sin.double()).unsqueeze(1)
    return torch.view_as_real(turned).reshape(x.shape)


@pytest.mark.parametrize("scale_offset", [0.0, 1.0])
def test_layer_norm_modulate_is_its_float64_formula(scale_offset: float) -> None:
    x, scale, shift = randn(7, 24) * 3 + 1, randn(24, seed=1), randn(24, seed=2)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = normalised * (scale.double() + scale_offset) + shift.double()
    near(layer_norm_modulate(x, scale, shift, EPS, scale_offset, torch.float32), expected)
    rounded = layer_norm_modulate(x, scale, shift, EPS, scale_offset, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    near(rounded, expected, 2**-8)


def test_rms_norm_is_its_float64_formula_and_writes_in_place() -> None:
    x, weight = randn(7, 24), randn(24, seed=1)
    expected = rms64(x, weight)
    rms_norm_(x, weight, EPS)
    near(x, expected)


def test_rms_norm_rounds_before_the_float32_weight_as_official_does() -> None:
    x, weight = randn(5, 24, dtype=torch.bfloat16), randn(24, seed=1)
    expected = (rms64(x, torch.ones(24)).float().bfloat16().float() * weight).bfloat16()
    rms_norm_(x, weight, EPS)
    assert torch.equal(x, expected)


def test_rms_norm_rope_is_its_float64_formula() -> None:
    x, weight = randn(7, 24), randn(24, seed=1)
    cos, sin = tables(7, 24 // HEADS // 2)
    expected = rope64(rms64(x, weight), cos, sin, HEADS)
    rms_norm_rope_(x, weight, cos, sin, HEADS, EPS)
    near(x, expected)


def test_rms_norm_rope_on_a_slice_of_rows_leaves_the_others_alone() -> None:
    x, weight = randn(9, 24), randn(24, seed=1)
    cos, sin = tables(9, 3)
    whole, before = x.clone(), x.clone()
    rms_norm_rope_(whole, weight, cos, sin, HEADS, EPS)
    rms_norm_rope_(x[2:5], weight, cos[2:5], sin[2:5], HEADS, EPS)
    near(x[2:5], whole[2:5])
    assert torch.equal(x[:2], before[:2])
    assert torch.equal(x[5:], before[5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated_add_is_its_float64_formula(dtype: torch.dtype) -> None:
    x, y, gate = randn(7, 24), randn(7, 24, seed=1, dtype=dtype), randn(24, seed=2)
    expected = x.double() + y.double() * gate.double()
    gated_add_(x, y, gate)
    near(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_is_pytorch_s_to_the_bit(dtype: torch.dtype) -> None:
    x, y = randn(7, 24), randn(7, 24, seed=1, dtype=dtype)
    expected = x + y
    add_(x, y)
    assert torch.equal(x, expected)


def test_gelu_is_its_float64_formula_in_tanh_form() -> None:
    x = randn(7, 24) * 4
    wide = x.double()
    expected = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    gelu_tanh_(x)
    near(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_of_a_product_is_the_product_and_then_gelu(dtype: torch.dtype) -> None:
    x, weight, bias = randn(7, 24, dtype=dtype), randn(40, 24, seed=1, dtype=dtype), randn(40, seed=2, dtype=dtype)
    expected = torch.addmm(bias, x, weight.t())
    gelu_tanh_(expected)
    assert torch.equal(linear_gelu(x, weight.t(), bias), expected)


def test_attention_is_its_float64_formula() -> None:
    q, k, v = randn(5, 2, 8), randn(9, 2, 8, seed=1), randn(9, 2, 8, seed=2)
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * 8**-0.5
    expected = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.double())
    out = attention(q, k, v)
    assert out.is_contiguous()
    near(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_parts_of_the_keys_is_merged_in_place(dtype: torch.dtype) -> None:
    q, k, v = (randn(rows, 3, 8, seed=rows, dtype=dtype) for rows in (7, 20, 20))
    expected, expected_sums = attention_with_sums(q.double(), k.double(), v.double())
    first, sums = attention_with_sums(q, k[:6], v[:6])
    out = first.float()
    for piece in (slice(6, 15), slice(15, 20)):
        merge_attention_(out, sums, *attention_with_sums(q, k[piece], v[piece]))
    near(out, expected, 1e-6 if dtype == torch.float32 else 2**-8)
    near(sums, expected_sums, 1e-6 if dtype == torch.float32 else 2**-8)


Call = Callable[[str, torch.dtype], Tensor]


def _layer_norm(device: str, dtype: torch.dtype) -> Tensor:
    return layer_norm_modulate(
        randn(6, 24, device=device), randn(24, device=device), randn(24, device=device), EPS, 1.0, dtype
    )


def _attention(device: str, dtype: torch.dtype) -> Tensor:
    return attention(randn(6, 4, 8, device=device, dtype=dtype), *(randn(9, 4, 8, device=device, dtype=dtype),) * 2)


def _sums(device: str, dtype: torch.dtype) -> Tensor:
    return attention_with_sums(*(randn(6, 4, 8, device=device, dtype=dtype),) * 3)[1]


def _attention_with_sums(device: str, dtype: torch.dtype) -> Tensor:
    return attention_with_sums(*(randn(6, 4, 8, device=device, dtype=dtype),) * 3)[0]


@pytest.mark.parametrize("call", [_layer_norm, _attention, _attention_with_sums, _sums])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fake_result_has_the_real_shape_dtype_and_strides(call: Call, dtype: torch.dtype) -> None:
    real, fake = call("cpu", dtype), call("meta", dtype)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
    assert fake.is_meta


OPERATIONS = {
    operation
    for module in (channel_norm, elementwise, merge, scaled_products)
    for operation in vars(module).values()
    if isinstance(operation, Operation) and operation.triton is not None
}


@pytest.mark.parametrize("operation", sorted(OPERATIONS, key=lambda operation: operation.name), ids=lambda o: o.name)
def test_the_kernel_of_an_operation_takes_what_its_reference_takes(operation: Operation[..., object]) -> None:
    spec = find_spec(operation.triton or "")
    tree = ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8"))
    found = {node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len(found[operation.name]) == len(inspect.signature(operation).parameters)


def test_on_a_gpu_with_triton_the_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "wanvram.kernels.operation"

    def fills(x: Tensor, _weight: Tensor, eps: float) -> None:
        x.fill_(eps)

    kernel = SimpleNamespace(rms_norm_=fills)
    monkeypatch.setattr(f"{ours}.uses_triton", lambda x: True)
    monkeypatch.setattr(f"{ours}.import_module", {"wanvram.kernels.triton_elementwise": kernel}.get)
    x, launched_on = torch.zeros(2, 3), []
    current = [x.get_device()]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(launched_on.append(device)))
    rms_norm_(x, torch.ones(3), 0.5)
    assert x.eq(0.5).all()
    assert launched_on == []
    current[0] += 1
    rms_norm_(x, torch.ones(3), 0.25)
    assert x.eq(0.25).all()
    assert launched_on == [x.device], "a tensor of another GPU than the current one"


def test_in_place_operations_run_on_meta_tensors() -> None:
    x, y, weight = (torch.empty(*shape, device="meta") for shape in ((6, 24), (6, 24), (24,)))
    cos = torch.empty(6, 3, device="meta")
    rms_norm_(x, weight, EPS)
    rms_norm_rope_(x, weight, cos, cos, HEADS, EPS)
    gated_add_(x, y, weight)
    add_(x, y)
    gelu_tanh_(x)
    assert x.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_by_column_groups_is_the_whole_norm(dtype: torch.dtype) -> None:
    x, weight = randn(7, 24, dtype=dtype), randn(24, seed=1)
    cos, sin = (t.float() for t in tables(7, 3))
    whole, inverse = x.clone(), torch.empty(7)
    rms_norm_rope_(whole, weight, cos, sin, HEADS, EPS)
    inverse_rms(x, inverse, EPS)
    near(inverse, (x.double().square().mean(-1) + EPS).rsqrt())
    for columns, heads in ((slice(0, 6), 1), (slice(6, 24), 3)):
        group = x[:, columns].contiguous()
        scaled_rope_(group, inverse, weight[columns], cos, sin, heads)
        assert torch.equal(group, whole[:, columns])


@pytest.mark.parametrize(
    "name", ["rms_norm_", "rms_norm_rope_", "gated_add_", "add_", "gelu_tanh_", "linear_gelu", "layer_norm_modulate"]
)
def test_the_declared_schema_is_what_the_operation_does(name: str) -> None:
    x, weight = randn(6, 24), randn(24, seed=1)
    cos, sin = tables(6, 3)
    arguments = {
        "rms_norm_": (x, weight, EPS),
        "rms_norm_rope_": (x, weight, cos, sin, HEADS, EPS),
        "gated_add_": (x, randn(6, 24, seed=2), weight),
        "add_": (x, randn(6, 24, seed=2)),
        "gelu_tanh_": (x,),
        "linear_gelu": (x, randn(24, 8, seed=2), randn(8, seed=3)),
        "layer_norm_modulate": (x, weight, weight, EPS, 1.0, torch.float32),
    }[name]
    operation = getattr(torch.ops.wanvram, name).default
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


GPU_SIZES = [(5, 24, 4), (7, 1536, 12), (33, 5120, 40)]
GPU_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # two roundings, one ulp each


def on_gpu(rows: int, width: int, heads: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every operation's result on the GPU, on slices that start at a row other than 0."""
    x = randn(rows + 3, width, device="cuda") * 2 + 0.5
    low = randn(rows + 3, width, seed=1, dtype=dtype, device="cuda")
    weight, shift = randn(width, seed=2, device="cuda"), randn(width, seed=3, device="cuda")
    cos, sin = tables(rows + 3, width // heads // 2, "cuda")
    cos, sin = cos.float(), sin.float()
    results = {"layer_norm_modulate": layer_norm_modulate(x[3:], weight, shift, EPS, 1.0, dtype)}
    rms, rope, gelu = low.clone(), low.clone(), low.clone() * 4
    rms_norm_(rms[3:], weight, EPS)
    rms_norm_rope_(rope[3:], weight, cos[3:], sin[3:], heads, EPS)
    gelu_tanh_(gelu[3:])
    gated_add_(x[3:], low[3:], shift)
    inverse = torch.empty(rows, device="cuda")
    inverse_rms(low[3:], inverse, EPS)
    half, columns = heads // 2, slice(0, width // 2)
    part = low[:, columns].contiguous()
    scaled_rope_(part[3:], inverse, weight[columns], cos[3:], sin[3:], half)
    results |= {"inverse_rms": inverse, "scaled_rope_": part}
    shape, merged, sums = (rows, heads, width // heads), x[3:].clone(), randn(heads, rows + 3, seed=4, device="cuda")
    other = randn(heads, rows, seed=5, device="cuda")
    merge_attention_(merged.view(shape), sums[:, 3:], low[3:].view(shape), other)
    results |= {"merge_attention_": merged, "merged sums": sums}
    added = x.clone()
    add_(added[3:], low[3:])
    assert torch.equal(added[3:], x[3:] + low[3:])
    results["add_"] = added
    matrix = randn(width, 64, seed=6, dtype=dtype, device="cuda") / width**0.5
    results["linear_gelu"] = linear_gelu(low, matrix, matrix[0])
    return results | {"rms_norm_": rms, "rms_norm_rope_": rope, "gelu_tanh_": gelu, "gated_add_": x}


@pytest.mark.parametrize("dtype", list(GPU_TOLERANCE))
@pytest.mark.parametrize(("rows", "width", "heads"), GPU_SIZES)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_kernels_match_the_reference(
    rows: int, width: int, heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    fused = on_gpu(rows, width, heads, dtype)
    monkeypatch.setenv("WANVRAM_KERNELS", "reference")
    reference = on_gpu(rows, width, heads, dtype)
    for name, expected in reference.items():
        error = (fused[name].double() - expected.double()).abs().max()
        assert fused[name].dtype == expected.dtype, name
        assert error <= GPU_TOLERANCE[dtype] * expected.double().abs().max(), f"{name}: {error}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_kernels_allocate_only_their_output() -> None:
    pytest.importorskip("triton")
    x, y = (randn(64, 5120, seed=s, device="cuda") for s in (0, 1))
    half, gate = y.bfloat16(), randn(5120, device="cuda")
    cos, sin = (t.float() for t in tables(64, 64, "cuda"))
    inverse, sums, heads = torch.ones(64, device="cuda"), torch.ones(40, 64, device="cuda"), (64, 40, 128)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "gated_add_": (lambda: gated_add_(x, half, gate), 0),
        "add_": (lambda: add_(x, half), 0),
        "rms_norm_": (lambda: rms_norm_(half, gate, EPS), 0),
        "rms_norm_rope_": (lambda: rms_norm_rope_(half, gate, cos, sin, 40, EPS), 0),
        "gelu_tanh_": (lambda: gelu_tanh_(half), 0),
        "linear_gelu": (lambda: linear_gelu(half, half.t(), half[0, :64]), 64 * 64 * 2),
        "inverse_rms": (lambda: inverse_rms(half, inverse, EPS), 0),
        "scaled_rope_": (lambda: scaled_rope_(half, inverse, gate, cos, sin, 40), 0),
        "merge_attention_": (lambda: merge_attention_(x.view(heads), sums, half.view(heads), sums), 0),
        "layer_norm_modulate": (lambda: layer_norm_modulate(x, gate, gate, EPS, 1.0, torch.bfloat16), half.nbytes),
    }
    for name, (call, expected) in calls.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before == expected, name

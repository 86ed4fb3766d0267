"""What CUDA's own kernels take where PyTorch's meta device takes operations apart, held against figures of an H200."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanvram import simulated_gpu
from wanvram.foreign.results import RULES, as_iterated

MIB = 1 << 20
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ("torch/encoder-bf16", "torch/encoder-fp32-seq-first", "torch/autocast-mlp", "text/clip-l")


def attended(mask: torch.Tensor) -> int:
    """Bytes that attention of 8 heads x 256 rows x 64 takes beside its inputs."""
    q = torch.zeros(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
    return torch.cuda.max_memory_allocated() - before


def test_a_mask_that_is_a_transposed_table_sends_attention_the_long_way_in_float32() -> None:
    with simulated_gpu("h200"):
        table = torch.zeros(256, 256, 8, device="cuda", dtype=torch.bfloat16)
        mask = table.permute(2, 0, 1).unsqueeze(0)
        scores, operand = 8 * 256 * 256 * 4, 8 * 256 * 64 * 4
        cublas = 32 * MIB
        # q, k, v and the scaled q in float32, scores and weights in float32, and a bool for every score
        assert (
            attended(mask) == 4 * operand + 2 * scores + scores // 4 + cublas + 8 * 256
        )  # the answer of `all`, a bool for every row
        assert attended(mask.contiguous()) < operand


def test_attention_without_any_fused_kernel_is_taken_apart() -> None:
    with simulated_gpu("h200"), sdpa_kernel(SDPBackend.MATH):
        assert attended(torch.zeros(256, 256, device="cuda", dtype=torch.bfloat16)) > 2 * 8 * 256 * 256 * 4


@pytest.mark.parametrize("name", QUICK)
def test_a_case_that_was_measured_on_a_gpu_is_predicted_to_the_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import foreign_predict

    measured = json.loads((BENCHMARKS / "2026-11-29_h200_foreign_measured.json").read_text())["cases"][name]
    with simulated_gpu("h200"):
        predicted = foreign_predict.run_case(name)
    figures = ("base_bytes", "allocated_bytes", "reserved_bytes")
    assert [predicted[key] for key in figures] == [measured[key] for key in figures]


def test_a_transposed_batch_of_one_is_laid_out_as_without_a_simulation() -> None:
    """What decides in a VAE's decoder whether everything after the attention of its middle is channels_last."""

    def strides(device: str) -> list[tuple[int, ...]]:
        tokens = torch.zeros(1, 256, 64, device=device).transpose(1, 2).reshape(1, 64, 16, 16)
        added = tokens + torch.zeros(1, 64, 16, 16, device=device)
        scaled = added / 1.0
        return [t.stride() for t in (tokens, added, scaled, torch.nn.functional.interpolate(scaled, scale_factor=2.0))]

    plain = strides("cpu")
    with simulated_gpu("h200"):
        assert strides("cuda") == plain


# --- results by rule ---------------------------------------------------------------------------------------------------------

SHAPES = [(), (1,), (5,), (4, 5), (1, 5), (4, 1), (2, 4, 5), (2, 1, 5), (1, 1, 1), (3, 1, 4, 5), (0, 5), (5, 4)]
MIXED = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


def on_meta(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def laid_out(result: object) -> list[object]:
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return [(t.shape, t.stride(), t.dtype) for t in tensors]


def rule_cases() -> list[tuple[str, tuple[object, ...]]]:
    of_two = [f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div")]
    pairs = [(on_meta(a, d), on_meta(b, e)) for a in SHAPES for b in SHAPES for d, e in MIXED]
    cases: list[tuple[str, tuple[object, ...]]] = [(name, pair) for name in of_two for pair in pairs]
    cases += [(name, (on_meta(shape), value)) for name in of_two for shape in SHAPES for value in (2, 2.5, True)]
    cases += [(name, (on_meta(shape),)) for name in ("aten.gelu.default", "aten.silu.default") for shape in SHAPES]
    cases += [("aten.mm.default", pair) for pair in pairs]
    cases += [("aten.addmm.default", (on_meta(bias), *pair)) for bias in SHAPES[:4] for pair in pairs]
    for shape, last in (((2, 4, 5), (5,)), ((2, 4, 5), (4, 5)), ((0, 5), (5,)), ((4, 5), (4,))):
        for weight in (None, on_meta(last), on_meta(last, torch.float32)):
            cases.append(("aten.native_layer_norm.default", (on_meta(shape), list(last), weight, None, 1e-5)))
    return cases


def test_results_by_rule_lie_as_pytorchs_meta_kernels_lay_them_out() -> None:
    ruled = 0
    for name, args in rule_cases():
        found = RULES[name](*args)
        if found is not NotImplemented:
            _, operation, overload = name.split(".")
            expected = getattr(getattr(torch.ops.aten, operation), overload)(*args)
            assert laid_out(found) == laid_out(as_iterated(expected, args)), (name, args)
            ruled += 1
    assert ruled > 500


def test_an_operation_that_only_a_gpu_has_leaves_values_unknown_that_were_known() -> None:
    with simulated_gpu("h200") as gpu:
        q = torch.ones(1, 1, 8, 8, device="cuda")
        attended, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, True)
        assert (attended.shape, sums.shape) == ((1, 1, 8, 8), (1, 1, 32))
        assert attended.sum().item() == 0
        assert "zeros were taken" in gpu.gaps[0]

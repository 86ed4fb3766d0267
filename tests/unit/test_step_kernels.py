"""benchmarks/step_kernels.py: which group a kernel belongs to, what a profiled step sums up to, and when its table is refused."""

from __future__ import annotations

from typing import Any

import pytest
from step_kernels import Activity, activities, group_of, judge, table

CUTLASS = "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16gmem"


def kernel(name: str, start: float = 0.0, duration: float = 1.0, stream: int = 7) -> Activity:
    return Activity("kernel", name, stream, start, duration)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (CUTLASS, "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_2x1_h_bz_coopA_bias_TNT", "products with a fused epilogue"),
        ("nvjet_sm90_tst_256x128_64x4_2x1_h_bz_coopA_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "products"),
        ("_layer_norm_modulate_kernel", "modulation"),
        ("_rms_norm_rope_kernel", "norm and rotary"),
        ("_gated_add_kernel", "gated add"),
        ("_add_kernel", "plain add"),
        ("_gelu_tanh_kernel", "GELU"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies in the device"),
        ("void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>>", "plain add"),
        ("void at::native::reduce_kernel<512, 1>", "PyTorch's other kernels"),
        ("somebody_s_kernel", "other"),
    ],
)
def test_a_kernel_s_group_follows_from_its_name(name: str, group: str) -> None:
    assert group_of(kernel(name)) == group


def test_a_copy_s_direction_decides_its_group() -> None:
    assert group_of(Activity("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 7, 0, 1)) == "copies host-device"
    assert group_of(Activity("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7, 0, 1)) == "copies in the device"


def test_only_what_the_gpu_did_is_taken_from_a_trace() -> None:
    events = [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 2, "args": {}},
        {"ph": "X", "cat": "kernel", "name": "b", "ts": 5, "dur": 2, "args": {"stream": 7, "grid": [1, 2, 3]}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "a", "ts": 3, "dur": 2, "args": {"stream": 9, "bytes": 64}},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 5},
    ]
    assert activities({"traceEvents": events}) == [
        Activity("gpu_memcpy", "a", 9, 3.0, 2.0, (), 64),
        Activity("kernel", "b", 7, 5.0, 2.0, (1, 2, 3)),
    ]


def test_gaps_are_where_nothing_ran_on_the_stream_that_computes() -> None:
    found = table(
        [
            kernel("nvjet_a", 0, 4),
            kernel("_gated_add_kernel", 6, 2),
            kernel("overlapping", 7, 3),
            Activity("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 9, 1, 5, (), 1000),
        ]
    )
    assert (found["span_ms"], found["gaps"]["ms"], found["gaps"]["count"]) == (0.010, 0.002, 1)
    assert found["gaps"]["longest"] == [{"us": 2, "after": "nvjet_a", "before": "_gated_add_kernel"}]
    assert {entry["group"]: entry["ms"] for entry in found["groups"]} == {
        "products": 0.004,
        "other": 0.003,
        "gated add": 0.002,
    }
    assert found["beside"] == [{"group": "copies host-device", "count": 1, "ms": 0.005, "share": 0.5, "bytes": 1000}]


def row(**changes: Any) -> dict[str, Any]:
    step = {"kind": "step", "case": "a", "backend": "fa4", "steady_seconds": [1.0, 1.0], "profiled_seconds": 1.05}
    groups = [{"group": "products", "ms": 980.0}, {"group": "other", "ms": 20.0}]
    return step | {"groups": groups, "gaps": {"ms": 1.0}} | changes


def test_a_table_at_its_bounds_stands_beside_the_floor() -> None:
    floor = {"kind": "floor", "case": "a", "backend": "fa4", "block_seconds": 0.8}
    found = judge([row(), floor])
    assert found["breaches"] == []
    assert (found["cases"]["a fa4"]["floor_seconds"], found["cases"]["a fa4"]["ratio"]) == (0.8, 1.25)


def test_kernels_in_no_group_and_a_disturbed_step_are_named() -> None:
    unknown = judge([row(groups=[{"group": "products", "ms": 97.0}, {"group": "other", "ms": 3.0}])])
    assert unknown["breaches"] == ["a fa4: 3.0% of the kernels' time is in no group, at most 2%"]
    assert "a step took 1.060 s, 1.000 without" in judge([row(profiled_seconds=1.06)])["breaches"][0]

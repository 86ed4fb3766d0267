"""Library buffers per GPU and the list of cards: values measured on the H200, PyTorch's rules elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanvram.errors import InputError
from wanvram.simulate.convolutions import Convolution
from wanvram.simulate.gpus import GPUS, find_gpu
from wanvram.simulate.libraries import Libraries
from wanvram.units import GIB, MIB

PROBES = Path(__file__).parents[2] / "benchmarks" / "2026-11-24_h200_probe_libraries.json"


@pytest.mark.parametrize(
    ("gpu", "workspace"),
    [("h200", 32 * MIB), ("h100", 32 * MIB), ("rtx5090", 32 * MIB), ("rtx4090", 8_519_680), ("a100-80gb", 8_519_680)],
)
def test_cublas_keeps_a_workspace_that_depends_on_the_architecture(gpu: str, workspace: int) -> None:
    assert Libraries(GPUS[gpu]).cublas_workspace_bytes == workspace


def test_the_buffers_of_the_first_product_are_the_measured_ones() -> None:
    libraries = Libraries(GPUS["h200"])
    measured = json.loads(PROBES.read_text(encoding="utf-8"))["addmm_out_bf16"]["first"]
    assert [libraries.cublas_workspace_bytes, libraries.cublaslt_workspace_bytes] == measured


@pytest.mark.parametrize(
    ("gpu", "dtype_bytes", "head_dim", "backend"),
    [
        ("h200", 2, 128, "cudnn"),
        ("h100", 2, 80, "cudnn"),
        ("h200", 4, 128, "efficient"),
        ("rtx5090", 2, 128, "flash"),
        ("rtx4090", 2, 128, "flash"),
        ("a100-40gb", 2, 256, "flash"),
        ("a100-40gb", 2, 384, "efficient"),
        ("rtx3090", 4, 128, "efficient"),
        ("t4", 2, 128, "efficient"),
    ],
)
def test_the_attention_backend_follows_gpu_dtype_and_head(
    gpu: str, dtype_bytes: int, head_dim: int, backend: str
) -> None:
    assert Libraries(GPUS[gpu]).attention_backend(dtype_bytes, head_dim) == backend


@pytest.mark.parametrize(("lq", "lk"), [(4096, 32760), (4096, 512), (32760, 32760)])
def test_cudnn_attention_takes_what_was_measured_around_its_output(lq: int, lk: int) -> None:
    before, during = Libraries(GPUS["h200"]).attention_extra("cudnn", lq, 12)
    output = lq * 12 * 128 * 2
    sequence = [*before, output, *during, *(-n for n in during), *(-n for n in reversed(before))]
    probes = json.loads(PROBES.read_text(encoding="utf-8"))
    assert sequence == probes[f"sdpa_bf16_{lq}x{lk}x12"]["second"]


def test_flash_attention_takes_a_float32_log_sum_exp_and_two_seeds() -> None:
    before, during = Libraries(GPUS["rtx4090"]).attention_extra("flash", 75600, 40)
    assert (before, during) == ((), (75600 * 40 * 4, 16, 8))
    # h200.md: flash 749.8 MiB, cuDNN 738.3 MiB, which is the output
    assert sum(during) / MIB == pytest.approx(749.8 - 738.3, abs=0.1)


def test_efficient_attention_takes_nothing() -> None:
    assert Libraries(GPUS["t4"]).attention_extra("efficient", 512, 64) == ((), ())


def test_a_convolution_takes_what_was_measured() -> None:
    conv = Convolution("float32", (16, 1, 60, 104), (16, 16, 1, 1, 1), (1, 1, 1), (0, 0, 0))
    assert Libraries(GPUS["h200"]).conv_workspace(conv) == 656


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("h200", "h200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        (" rtx 4060 ", "rtx4060"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070ti-super"),
        ("RTX_4070", "rtx4070"),
        ("simulated:rtx3060-12gb", "rtx3060-12gb"),
    ],
)
def test_a_card_is_found_by_key_product_or_driver_name(text: str, key: str) -> None:
    assert find_gpu(text).key == key


@pytest.mark.parametrize(
    "text", ["", "rtx9999", "a100", "nvidia", "NVIDIA H20", "NVIDIA L4", "NVIDIA GeForce RTX 4070 Ti", "t"]
)
def test_an_unknown_or_ambiguous_card_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(InputError, match=r"nearest of these \(--gpu\): h200, h100"):
        find_gpu(text)


def test_every_card_is_plausible_and_only_the_measured_one_says_so() -> None:
    for key, gpu in GPUS.items():
        assert gpu.key == key
        assert find_gpu(gpu.name) is gpu
        assert 7 * GIB < gpu.total_bytes < 145 * GIB
        assert gpu.note
        assert gpu.context_bytes + sum(gpu.module_bytes.values()) < GIB
        assert min(gpu.bf16_flops, gpu.fp32_flops, gpu.bandwidth_bytes, gpu.pcie_bytes) > 1e9
        assert gpu.pcie_bytes < gpu.bandwidth_bytes
        assert (gpu.fp8_flops is not None) == (gpu.compute_capability >= (8, 9))
    assert [key for key, gpu in GPUS.items() if gpu.measured] == ["h200"]

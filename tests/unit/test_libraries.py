"""Library buffers per GPU and the list of cards: values measured on the H200, PyTorch's rules elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wanvram.kernels.attention_backends import BACKENDS, chosen
from wanvram.simulate.convolutions import Convolution
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.libraries import Libraries
from wanvram.units import MIB

BY_NAME = {backend.name: backend for backend in BACKENDS}
PROBES = Path(__file__).parents[2] / "benchmarks" / "2026-11-24_h200_probe_libraries.json"


@pytest.mark.parametrize(
    ("gpu", "workspace"),
    [("h200", 32 * MIB), ("h100", 32 * MIB), ("rtx5090", 32 * MIB), ("rtx4090", 8_519_680), ("a100-80gb", 8_519_680)],
)
def test_cublas_keeps_a_workspace_that_depends_on_the_architecture(gpu: str, workspace: int) -> None:
    assert Libraries(GPUS[gpu]).persistent_buffers("cublas") == (workspace,)


def test_the_buffers_of_the_first_product_are_the_measured_ones() -> None:
    libraries = Libraries(GPUS["h200"])
    measured = json.loads(PROBES.read_text(encoding="utf-8"))["addmm_out_bf16"]["first"]
    assert [*libraries.persistent_buffers("cublas"), *libraries.persistent_buffers("cublaslt")] == measured


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
    assert chosen(GPUS[gpu].compute_capability, dtype_bytes, head_dim).name == backend


@pytest.mark.parametrize(("lq", "lk"), [(4096, 32760), (4096, 512), (32760, 32760)])
def test_cudnn_attention_takes_what_was_measured_around_its_output(lq: int, lk: int) -> None:
    before, during = BY_NAME["cudnn"].extra(lq, 12)
    output = lq * 12 * 128 * 2
    sequence = [*before, output, *during, *(-n for n in during), *(-n for n in reversed(before))]
    probes = json.loads(PROBES.read_text(encoding="utf-8"))
    assert sequence == probes[f"sdpa_bf16_{lq}x{lk}x12"]["second"]


def test_flash_attention_takes_a_float32_log_sum_exp_and_two_seeds() -> None:
    before, during = BY_NAME["flash"].extra(75600, 40)
    assert (before, during) == ((), (75600 * 40 * 4, 16, 8))
    # h200.md: flash 749.8 MiB, cuDNN 738.3 MiB, which is the output
    assert sum(during) / MIB == pytest.approx(749.8 - 738.3, abs=0.1)


def test_efficient_attention_takes_nothing() -> None:
    assert BY_NAME["efficient"].extra(512, 64) == ((), ())


def test_a_convolution_takes_what_was_measured() -> None:
    conv = Convolution("float32", (16, 1, 60, 104), (16, 16, 1, 1, 1), (1, 1, 1), (0, 0, 0))
    assert Libraries(GPUS["h200"]).conv_workspace(conv) == 656


def test_every_attention_backend_names_what_computes_it_and_a_rate_of_every_card() -> None:
    for backend in BACKENDS:
        assert callable(backend.function()), backend.name
        shares = [getattr(GPUS["h200"].efficiency, share) for share in backend.reached.values()]
        assert all(0 < share < 1 for share in shares), backend.name


def test_the_registry_of_attention_backends_loads_without_torch() -> None:
    code = "import sys, wanvram.kernels.attention_backends; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The measuring scripts of benchmarks/ run unmodified on the simulated H200 and give what was measured there."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wanvram import simulated_gpu

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def measured(task: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BENCHMARKS / f"2026-11-24_beside_diffusers_{task}.json").read_text())
    return found


def simulated(part: str, task: str) -> dict[str, float]:
    import beside_diffusers

    with simulated_gpu("h200"), torch.no_grad():
        return beside_diffusers.PARTS[part](task)


@pytest.mark.parametrize("task", ["1.3B", "14B"])
def test_the_transformer_takes_what_was_measured_to_the_byte(task: str) -> None:
    told, found = measured(task)["diffusers_dit"], simulated("diffusers_dit", task)
    for figure in ("base_mib", "activation_mib", "reserved_mib"):
        assert found[figure] == told[figure]


@pytest.mark.parametrize("task", ["1.3B", "14B"])
def test_the_vae_takes_what_was_measured_within_a_thousandth_allocated_and_a_hundredth_reserved(task: str) -> None:
    told, found = measured(task)["diffusers_vae"], simulated("diffusers_vae", task)
    assert found["base_mib"] == told["base_mib"]
    assert found["activation_mib"] == pytest.approx(told["activation_mib"], rel=1e-3)
    assert found["reserved_mib"] == pytest.approx(told["reserved_mib"], rel=1e-2)


OFFLOADED = [("1.3B-832x480", "diffusers_dit_leaf"), ("1.3B-832x480", "diffusers_dit_block")]


@pytest.mark.parametrize(("case", "part"), [*OFFLOADED, ("14B-1280x720", "diffusers_dit_leaf")])
def test_offloading_with_record_stream_is_exact_but_for_reserved_which_is_within_a_tenth(
    case: str, part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import beside_diffusers_offload as script

    rows = json.loads((BENCHMARKS / "2026-11-24_h100_beside_diffusers_offload.json").read_text())["parts"]
    (told,) = (row for row in rows if (row["case"], row["part"]) == (case, part))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with simulated_gpu("h200") as gpu:
        script.run_here(script.CASES[case], part)
    found = json.loads(capsys.readouterr().out.partition("DONE ")[2])
    assert found["allocated_bytes"] == told["allocated_bytes"]
    assert found["reserved_bytes"] == pytest.approx(told["reserved_bytes"], rel=0.1)
    beside = gpu.memory.device_memory() - gpu.memory.allocator.reserved_bytes
    assert beside == told["nvml_bytes"] - told["reserved_bytes"]  # context, libraries, page tables of pinned memory

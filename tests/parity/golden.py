"""Reads golden cases (format: tests/golden/README.md) from WANVRAM_GOLDEN or tests/golden."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DIRECTORY = Path(os.environ.get("WANVRAM_GOLDEN", Path(__file__).parent.parent / "golden"))
RELATIVE_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Case:
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def weights(self) -> dict[str, torch.Tensor]:
        prefix = "weight."
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def calls(self) -> list[dict[str, Any]]:
        return list(self.meta["calls"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def load_case(stem: str) -> Case:
    meta = json.loads((DIRECTORY / f"{stem}.json").read_text())
    tensors = load_file(DIRECTORY / f"{stem}.safetensors")
    for name, info in meta.get("tiled", {}).items():
        tensors[name] = tensors.pop("tile." + name).repeat(*info["reps"])
    return Case(meta, tensors)


def load_json(stem: str) -> dict[str, Any]:
    return dict(json.loads((DIRECTORY / f"{stem}.json").read_text()))


def assert_close(actual: torch.Tensor, golden: torch.Tensor, what: str) -> None:
    """Integers exactly; floats within RELATIVE_TOLERANCE of the tensor's absolute maximum."""
    assert actual.shape == golden.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(golden.shape)}"
    if not golden.is_floating_point():
        assert torch.equal(actual, golden), f"{what}: integers differ"
        return
    error = (actual.double() - golden.double()).abs().max().item()
    scale = max(golden.abs().max().item(), 1e-30)
    assert error <= RELATIVE_TOLERANCE * scale, f"{what}: relative error {error / scale:.2e} > {RELATIVE_TOLERANCE}"

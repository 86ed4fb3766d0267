"""What operations of libraries took on a real GPU beside their results: the table that `wanvram harvest` writes and simulations obey.

    {"schema": 1,
     "device": {"gpu": "NVIDIA H200", "compute_capability": [9, 0], "multiprocessors": 132, "torch": "2.11.0+cu130", "cudnn": 91900,
                "cudnn_benchmark": false, "cudnn_deterministic": false},
     "operations": [{"operation": "aten.convolution.default", "arguments": "float32 1x16x5x60x104 contiguous, ...",
                     "bytes": 1463812096, "calls": 2}]}

bytes: the allocator's peak of requested bytes during the call less what stays. Where calls of equal arguments differ, the largest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wanvram.errors import DamagedError, InputError
from wanvram.foreign.layouts import layout_of
from wanvram.foreign_text import quoted, shown, why
from wanvram.input_files import read_text
from wanvram.record import write_atomically
from wanvram.simulate.gpus import GPU
from wanvram.strict_json import built, strict_json

__all__ = ["MeasuredDevice", "MeasuredOperation", "MeasuredTable", "arguments_text"]

SCHEMA = 1
MAX_TABLE_BYTES = 64 << 20
MAX_OPERATIONS = 200_000
MAX_TAKEN_BYTES = 1 << 40


@dataclass(frozen=True)
class MeasuredDevice:
    """Where and with what a table was measured. cudnn_benchmark, cudnn_deterministic: torch.backends.cudnn's when the script ended."""

    gpu: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    torch: str
    cudnn: int
    cudnn_benchmark: bool = False
    cudnn_deterministic: bool = False


@dataclass(frozen=True)
class MeasuredOperation:
    """operation: as PyTorch's dispatcher names it. arguments: see arguments_text. bytes: taken for the length of a call."""

    operation: str
    arguments: str
    bytes: int
    calls: int


class MeasuredTable:
    """used, missed: operations -> calls that were measured, and calls of the same operations with arguments that were not."""

    def __init__(self, device: MeasuredDevice, operations: Iterable[MeasuredOperation]) -> None:
        self.device = device
        self.operations = tuple(operations)
        self.names = {entry.operation for entry in self.operations}
        self.used: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._taken: dict[tuple[str, str], int] = {}
        for entry in self.operations:
            key = entry.operation, entry.arguments
            self._taken[key] = max(entry.bytes, self._taken.get(key, 0))

    def taken(self, operation: str, args: Any, kwargs: dict[str, Any]) -> int | None:
        """Bytes; None where it was not measured with such arguments."""
        if operation not in self.names:
            return None
        found = self._taken.get((operation, arguments_text(args, kwargs)))
        (self.missed if found is None else self.used)[operation] += 1
        return found

    def check_card(self, card: GPU) -> None:
        """Raises InputError where it was measured on another architecture, whose libraries choose other kernels."""
        if self.device.compute_capability != card.compute_capability:
            own, other = ("sm_{}{}".format(*c) for c in (card.compute_capability, self.device.compute_capability))
            raise InputError(
                f"the measured table is of {shown(self.device.gpu, 60)} ({other}), not of {card.name} ({own}): "
                "libraries choose other kernels there"
            )

    def to_json(self) -> dict[str, Any]:
        operations = [asdict(entry) for entry in self.operations]
        return {"schema": SCHEMA, "device": asdict(self.device), "operations": operations}

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> MeasuredTable:
        """Raises InputError naming the path and what is wrong."""
        try:
            data = strict_json(read_text(path, MAX_TABLE_BYTES))
            if not isinstance(data, dict) or data.get("schema") != SCHEMA:
                raise DamagedError(f"it is no table of schema {SCHEMA}")
            entries = data["operations"]
            if not isinstance(entries, list) or len(entries) > MAX_OPERATIONS:
                raise DamagedError(f"operations is {quoted(entries)}; expected a list of at most {MAX_OPERATIONS:,}")
            device = built(MeasuredDevice, data["device"], "device")
            operations = [built(MeasuredOperation, e, f"operations.{number}") for number, e in enumerate(entries)]
            for number, entry in enumerate(operations):
                if not 0 <= entry.bytes <= MAX_TAKEN_BYTES:
                    raise DamagedError(f"operations.{number}.bytes is {entry.bytes}, outside 0..{MAX_TAKEN_BYTES}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{shown(path)} is no table that wanvram harvest wrote: {why(error)}") from error
        return cls(device, operations)


def arguments_text(args: Any, kwargs: dict[str, Any]) -> str:
    """Tensors by type, shape and layout, everything else as it is written: equal for calls that take the same."""
    parts = [_text(value) for value in args]
    return ", ".join([*parts, *(f"{name}={_text(value)}" for name, value in sorted(kwargs.items()))])


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return f"{str(value.dtype).removeprefix('torch.')} {shape} {layout_of(value)}"
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(map(_text, value))}]"
    if isinstance(value, torch.device):
        return value.type if value.type != "meta" else "cuda"
    return "-" if value is None else str(value)

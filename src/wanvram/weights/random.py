"""Random weights, generated in place where they will live: real sizes and speeds without a checkpoint.

Values keep every model finite, in float16 too: matrices are small, norms 1, biases 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wanvram.errors import CheckpointError
from wanvram.weights.sources import check_shape

__all__ = ["RandomSource"]

STD = 0.02
# A CPU draws about 0.1e9 normal numbers per second: 14e9 would take minutes. Beyond this many (a prime, so that no
# row length divides it) a CPU tensor repeats itself, which costs a copy only. A GPU draws them all.
CPU_PERIOD = 1_048_573


class RandomSource:
    """Deterministic per (seed, key, destination dtype and device type)."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], seed: int) -> None:
        self._shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self._seed = seed

    def keys(self) -> list[str]:
        return list(self._shapes)

    def files(self) -> list[Path]:
        return []

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._shapes:
            raise CheckpointError(f"random weights: there is no tensor {key}")
        return self._shapes[key]

    def fill(self, key: str, dest: Tensor) -> None:
        shape = self.shape(key)
        check_shape(key, shape, dest, "random weights")
        name = key.rsplit(".", 1)[-1]
        with torch.no_grad():
            if name == "bias":
                dest.zero_()
            elif name == "gamma" or (name == "weight" and len(shape) == 1):  # every 1-D weight belongs to a norm
                dest.fill_(1.0)
            else:
                _fill_normal(dest, self._generator(key, dest.device))

    def fill_rows(self, key: str, dest: Tensor, first: int) -> None:
        """The values of `fill`. A GPU's generator gives them only all at once: there the whole tensor is drawn beside `dest`."""
        shape = self.shape(key)
        if tuple(dest.shape[1:]) != shape[1:] or first + dest.shape[0] > shape[0]:
            raise CheckpointError(
                f"random weights: {key} has shape {list(shape)}, without {list(dest.shape)} from row {first} on"
            )
        strides = (dest.stride(0), *dest.stride()[1:])
        whole = torch.empty_strided(shape, strides, dtype=dest.dtype, device=dest.device)
        self.fill(key, whole)
        dest.copy_(whole[first : first + dest.shape[0]])

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        """Rows drawn one by one, so that a table of any size costs only the rows asked for."""
        width = self.shape(key)[1]
        drawn = torch.empty(len(indices), width)
        for row, index in zip(drawn, indices, strict=True):
            row.normal_(generator=self._generator(f"{key}:{index}", "cpu"))
        return drawn

    def _generator(self, key: str, device: torch.device | str) -> torch.Generator:
        return torch.Generator(device).manual_seed((self._seed ^ _stable_hash(key)) & (2**63 - 1))


def _fill_normal(dest: Tensor, generator: torch.Generator) -> None:
    if dest.device.type != "cpu" or dest.numel() <= CPU_PERIOD or not dest.is_contiguous():
        dest.normal_(0.0, STD, generator=generator)
        return
    flat = dest.view(-1)
    flat[:CPU_PERIOD].normal_(0.0, STD, generator=generator)
    done = CPU_PERIOD
    while done < flat.numel():
        count = min(done, flat.numel() - done)
        flat[done : done + count].copy_(flat[:count])
        done += count


def _stable_hash(key: str) -> int:
    """63 bits; Python's own hash differs from process to process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1

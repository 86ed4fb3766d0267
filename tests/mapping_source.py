"""Weights for tests: tensors already in memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from wanvram.weights.sources import FileSource


class MappingSource(FileSource):
    """Tensors already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str = "tensors in memory") -> None:
        super().__init__(tensors, origin)

"""What foreign code can meet beside its own errors: a full device as PyTorch raises it, and what cannot be simulated."""

from __future__ import annotations

import torch

from wanvram.errors import InputError, OutOfMemory

__all__ = ["SimulatedOutOfMemory", "UnknownOperation", "Unsupported"]


class SimulatedOutOfMemory(OutOfMemory, torch.OutOfMemoryError):
    """`except torch.OutOfMemoryError` (and `torch.cuda.OutOfMemoryError`) of the program catches it, as on a GPU."""


class Unsupported(InputError, RuntimeError):
    """What is refused by name because the simulation would say something wrong about it."""


class UnknownOperation(Unsupported):
    """An operation of which nothing is known: no meta kernel, or a result whose shape hangs on values."""

    def __init__(self, name: str, why: str = "it has no meta kernel") -> None:
        super().__init__(
            f"{name} cannot be simulated: {why}; wanvram.foreign.register_operation can state what it returns and takes"
        )

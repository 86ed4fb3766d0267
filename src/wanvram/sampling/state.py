"""What a solver knows between two steps, so that sampling can end there and go on elsewhere, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from wanvram.sampling.schedule import Solver

__all__ = ["SolverState", "held_after"]


@dataclass
class SolverState:
    """After `made` steps. latent: what the next step starts from. corrected: of UniPC, what the last prediction started from.
    previous, clean: x0 estimates of the step before the last and of the last one. All are float32 of one shape; None: not made yet.

    No step draws noise: there is nothing else. A solver changes its state in place, so that no tensor lives longer than
    it is needed; changing: it is doing so, and an exception may have left half of a step.
    """

    made: int
    latent: Tensor
    corrected: Tensor | None = None
    previous: Tensor | None = None
    clean: Tensor | None = None
    changing: bool = False

    @classmethod
    def of(cls, made: int, tensors: Mapping[str, Tensor]) -> SolverState:
        """From what `tensors` gave."""
        return cls(made, tensors["latent"], tensors.get("corrected"), tensors.get("previous"), tensors.get("clean"))

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def held_after(solver: Solver, made: int, steps: int) -> tuple[str, ...]:
    """Names of the tensors with which a trajectory of so many steps goes on; after the last one it is its result alone."""
    if made == steps:
        return ("latent",)
    if solver == "dpm++":
        return ("latent", "clean")
    return ("latent", "corrected", "clean", "previous")[: 3 if made == 1 else 4]

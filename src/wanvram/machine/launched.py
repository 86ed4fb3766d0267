"""Which of several GPUs' processes this one is: what torchrun says in the environment. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from wanvram.errors import InputError

__all__ = ["Launched", "launched"]


@dataclass(frozen=True)
class Launched:
    """local_rank: among those of this machine, and the number of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_one_of_several(self) -> bool:
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Speaks for all, and writes what they make."""
        return self.rank == 0


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """The only one of one where no launcher says otherwise. Raises InputError for numbers that no launcher gives."""
    given = os.environ if environment is None else environment
    if given.get("WORLD_SIZE", "1") == "1" or "RANK" not in given:  # also torchrun with one process; a job's size alone
        return Launched()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, size, local = (int(given[name]) for name in names)
        valid = 0 <= local <= rank < size
    except (KeyError, ValueError):
        valid = False
    if not valid:
        said = ", ".join(f"{name}={given.get(name)}" for name in names)
        raise InputError(
            f"the environment has {said}, which no launcher of several processes says; use torchrun or --gpus N"
        )
    return Launched(rank, size, local)

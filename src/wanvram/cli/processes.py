"""What the verbs that run do about several GPUs: sizes for as many as there are, and who starts the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.knobs import PARALLEL_DEGREE, gpus
from wanvram.machine.launched import launched
from wanvram.planner.sizes import sizes_at_once
from wanvram.record import Predicted

if TYPE_CHECKING:
    from wanvram.run.world import World

__all__ = ["Decision", "decided", "for_all", "must_start", "processes"]

Decision = tuple[RunConfig, Predicted | None, Path]


def for_all(config: RunConfig, *, to_be_planned: bool = False) -> RunConfig:
    """With sizes for every GPU that is asked for, or for every process that a launcher has started.

    to_be_planned: sizes that nobody gave are left to the planner, which is told how many GPUs there are.
    """
    me, asked = launched(), PARALLEL_DEGREE.of(config.strategy)
    if me.is_one_of_several and config.device == "simulated":
        raise InputError("device: simulated takes one process, whatever the number of GPUs; run it without torchrun")
    count = me.size if me.is_one_of_several else asked
    if count == 1:
        return config
    if to_be_planned and config.gpus == 1:
        return replace(config, strategy=PARALLEL_DEGREE.set(config.strategy, count))
    return sizes_at_once(config, count)


def must_start(config: RunConfig) -> bool:
    """Whether this command starts the run's processes, and is none of them."""
    if gpus(config.strategy) == 1 or launched().is_one_of_several:
        return False
    from wanvram.run.execute import device_kind

    return device_kind(config) != "simulated"


@contextmanager
def processes() -> Iterator[World | None]:
    """Those of the run, of which this is one; None where it is alone."""
    me = launched()
    if not me.is_one_of_several:
        yield None
        return
    from wanvram.run.world import joined

    with joined(me) as world:
        yield world


def decided(world: World | None, decide: Callable[[], Decision]) -> Decision:
    """What one process decides for all: seed, plan and place."""
    if world is None:
        return decide()

    def as_data() -> dict[str, object]:
        config, predicted, directory = decide()
        said = None if predicted is None else asdict(predicted)
        return {"config": config.to_dict(), "predicted": said, "directory": str(directory)}

    data = world.shared("decision", as_data)
    predicted = Predicted(**data["predicted"]) if data["predicted"] else None
    return RunConfig.from_dict(data["config"]), predicted, Path(data["directory"])

"""Forecasts of a few figures each: what a component takes is a function of its name and strategy, and the budget has no margin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wanvram.config import Request, RunConfig, Strategy
from wanvram.planner.budget import PROCESS_BYTES, Budget
from wanvram.planner.forecasts import StageForecast, Trials

__all__ = ["REQUEST", "Table", "trials_of"]

REQUEST = Request.for_task("t2v-1.3B", size="832*480", sample_steps=10)  # 30 blocks; T5, transformer and decoder
Figure = Callable[[str, Strategy], Any]


@dataclass
class Table:
    """peak, base and host in bytes; step and seconds may be None. asked: (component, strategy) in order."""

    peak: Figure = lambda name, s: 1
    base: Figure = lambda name, s: 0
    host: Figure = lambda name, s: 0
    step: Figure = lambda name, s: 1.0
    seconds: Figure = lambda name, s: 1.0
    asked: list[tuple[str, Strategy]] = field(default_factory=list)

    def __call__(self, config: RunConfig, name: str) -> StageForecast:
        s = config.strategy
        self.asked.append((name, s))
        peak, step = self.peak(name, s), self.step(name, s) if name == "dit" else None
        return StageForecast(
            name, peak, peak, peak, self.base(name, s), self.host(name, s), step, self.seconds(name, s), s.batch_size
        )


def trials_of(table: Table, limit: int, ram: int | None = None, request: Request = REQUEST, gpus: int = 1) -> Trials:
    """limit: of device memory. ram: what weights may take of the host's, beside the process."""
    host = None if ram is None else ram + gpus * PROCESS_BYTES
    return Trials(request, Budget(limit, 0, host, "h200", system_bytes=0, gpus=gpus), table)

"""Gives inputs to the verbs, in a process whose memory and time are limited:

    python child.py SOURCES OUT SEED --seconds S --count N --kinds yaml,flags [--hypothesis]

OUT/state.json says after every input what was tried and what went wrong; the last line on stdout says the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.judge import CPU_SECONDS, MEMORY, Used, judged, limit_memory
from fuzz.kinds import KINDS, without_long_work

LARGEST_KEPT = 20  # failures
VARYING = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S*|\d""")  # of two sentences of one kind


class _TimeUpError(KeyboardInterrupt):
    """The one way to end hypothesis early: an input that draws less than the last time is an error for it."""


class Child:
    def __init__(self, sources: Path, out: Path) -> None:
        self.sources, self.out = sources, out
        self.home = Path.cwd()
        self.state: dict[str, Any] = {"count": 0, "by_kind": {}, "seen": {}, "failures": []}
        (out / "now").mkdir(parents=True, exist_ok=True)

    def once(self, kind: str, rng: random.Random) -> list[str]:
        """What is wrong with the answers to one input."""
        now, used = self.out / "now", Used()
        os.chdir(self.home)
        shutil.rmtree(now)
        now.mkdir()
        (self.out / "last").write_text(f"{kind}, input {self.state['count']}")
        with used.measured():
            wrong = judged(KINDS[kind](rng, self.sources, now))
        ranks = len(
            list(now.rglob("memory_events.rank*.json"))
        )  # processes of their own, with an import of PyTorch each
        if used.cpu_seconds > (2 + ranks) * CPU_SECONDS:  # several commands, each within its limit, and their children
            wrong.append(f"{used.cpu_seconds:.0f} s of CPU with the processes it started, {ranks} ranks among them")
        if used.memory_bytes > MEMORY:
            wrong.append(f"{used.memory_bytes >> 20} MiB")
        self._count(kind, used)
        return wrong

    def _count(self, kind: str, used: Used) -> None:
        row = self.state["by_kind"].setdefault(
            kind, {"inputs": 0, "cpu_seconds": 0.0, "worst_cpu_seconds": 0.0, "worst_bytes": 0}
        )
        row["inputs"] += 1
        row["cpu_seconds"] = round(row["cpu_seconds"] + used.cpu_seconds, 3)
        row["worst_cpu_seconds"] = round(max(row["worst_cpu_seconds"], used.cpu_seconds), 3)
        row["worst_bytes"] = max(row["worst_bytes"], used.memory_bytes)
        self.state["count"] += 1

    def keep(self, kind: str, wrong: list[str]) -> None:
        """The folder of the failed input moves to a place of its own; of the same failure only the first is kept."""
        os.chdir(self.home)
        sign = f"{kind} {VARYING.sub('', wrong[0].partition(': ')[2])[:120]}" if wrong else kind
        self.state["seen"][sign] = self.state["seen"].get(sign, 0) + 1
        if self.state["seen"][sign] > 1:
            return
        kept = self.out / f"failure-{len(self.state['failures'])}"
        shutil.rmtree(kept, ignore_errors=True)
        (self.out / "now").rename(kept)
        (self.out / "now").mkdir()
        self.state["failures"].append(
            {"kind": kind, "sign": sign, "kept": str(kept), "wrong": ascii(" | ".join(wrong))[:4000]}
        )

    def save(self) -> None:
        (self.out / "state.part").write_text(json.dumps(self.state))
        os.replace(self.out / "state.part", self.out / "state.json")


def by_chance(child: Child, kinds: Sequence[str], seed: int, end: float, count: int) -> None:
    rng = random.Random(seed)
    for number in range(count):
        if time.monotonic() > end or len(child.state["failures"]) >= LARGEST_KEPT:
            break
        kind = kinds[number % len(kinds)]
        wrong = child.once(kind, rng)
        if wrong:
            child.keep(kind, wrong)
        child.save()


def by_hypothesis(child: Child, kinds: Sequence[str], seed: int, end: float, count: int) -> None:
    """hypothesis chooses what the generators draw, and shrinks what fails to the smallest input that does."""
    for number, kind in enumerate(kinds):
        share = (end - time.monotonic()) / (len(kinds) - number)
        wrong = _smallest(child, kind, seed, time.monotonic() + share, count)
        if wrong:
            child.keep(kind, wrong)
    child.save()


def _smallest(child: Child, kind: str, seed: int, end: float, count: int) -> list[str]:
    """What is wrong with the smallest input that fails, which is the last one tried; empty if none does."""
    import hypothesis
    from hypothesis import strategies

    last: list[str] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=min(count, 100_000),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def once(rng: random.Random) -> None:
        if time.monotonic() > end and not last:
            raise _TimeUpError
        wrong = child.once(kind, rng)
        if wrong:
            last[:] = wrong
        child.save()
        assert not wrong

    try:
        once()
    except _TimeUpError:
        return []
    except Exception as error:  # also "flaky", where the same input went well the second time
        return last or [f"hypothesis: {error!r}"]
    return []


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    child = Child(arguments.sources.absolute(), arguments.out.absolute())
    end = time.monotonic() + arguments.seconds
    how = by_hypothesis if arguments.hypothesis else by_chance
    with without_long_work():
        how(child, arguments.kinds.split(","), arguments.seed, end, arguments.count)
    os.chdir(child.home)
    return child.state


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--hypothesis", action="store_true")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    limit_memory()
    print(json.dumps(run(given)))

"""What is tried: a kind of input is a function that writes one into a folder and says what is done with it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fuzz.flags import try_flags
from fuzz.judge import ReachedError, Trial, command
from fuzz.media import try_media
from fuzz.mutations import mutated
from fuzz.service import try_service
from fuzz.weights import try_checkpoint
from fuzz.written import try_card, try_yaml
from wanvram.config import RunConfig

__all__ = ["BY_HYPOTHESIS", "KINDS", "without_long_work"]

SMALL = 128 * 80 * 9 * 4  # pixels times frames times steps: 1.5 s on a CPU
LONG_WORK = (
    ("wanvram.predict.plan.plan_run", None),
    ("wanvram.predict.longest.plan_longest", None),
    ("wanvram.predict.advice.advise", None),
    ("wanvram.predict.simulate.simulate", "small"),
    ("wanvram.predict.simulate.run_or_simulate", "small"),
    ("wanvram.cli.profile.run_all", None),
)


def try_run(rng: random.Random, sources: Path, now: Path) -> list[Trial]:
    """A run directory, one of whose files is damaged."""
    shutil.copytree(sources / "run", now, dirs_exist_ok=True)
    place = rng.choice(sorted(path for path in now.iterdir() if path.is_file()))
    place.write_bytes(mutated(place.name, place.read_bytes(), rng))
    folder, report = str(now), ["report", str(now), "--format"]
    commands = [["analyze", folder], ["analyze", folder, "--json"], [*report, "md"], [*report, "text"], ["report", folder, "--json"],
                ["compare", folder, folder], ["compare", folder, "--json"]]  # fmt: skip
    return [command(arguments, (0, 2)) for arguments in commands]


def try_file(rng: random.Random, sources: Path, now: Path) -> list[Trial]:
    """A trace, a snapshot or a file of events."""
    source = rng.choice(sorted(path for path in (sources / "file").iterdir() if path.is_file()))
    place = now / source.name
    place.write_bytes(mutated(source.name, source.read_bytes(), rng))
    return [command(["analyze", str(place)], (0, 2)), command(["analyze", str(place), "--json"], (0, 2))]


KINDS: dict[str, Callable[[random.Random, Path, Path], list[Trial]]] = {
    "run": try_run,
    "file": try_file,
    "yaml": try_yaml,
    "card": try_card,
    "flags": try_flags,
    "checkpoint": try_checkpoint,
    "media": try_media,
    "service": try_service,
}
BY_HYPOTHESIS = ("yaml", "card", "flags")  # small enough for hypothesis to make and to shrink


def without_long_work() -> ExitStack:
    """Plans, series and runs of full-size models end where they would begin; what is tiny and short is run."""
    stack = ExitStack()
    for name, only in LONG_WORK:
        patched = patch(name)
        original, _ = patched.get_original()
        stack.enter_context(patch(name, _ending(original, only is not None)))
    return stack


def _ending(original: Callable[..., Any], runs_small: bool) -> Callable[..., Any]:
    def ended(config: RunConfig, *args: Any, **options: Any) -> Any:
        if runs_small and _is_small(config):
            return original(config, *args, **options)
        raise ReachedError

    return ended


def _is_small(config: RunConfig) -> bool:
    r = config.request
    from wanvram import specs

    tiny = config.weights == "tiny" or specs.T5["umt5-xxl"] == specs.T5["tiny"]
    count = max(1, len(r.prompts))
    return (
        tiny
        and config.device in ("cpu", "simulated")
        and r.width * r.height * r.frame_num * r.sample_steps * count <= SMALL
    )

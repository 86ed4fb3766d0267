"""An interrupted run, found again in its directory: what it was, how far it got, and whether it is still the same. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wanvram import knobs
from wanvram.command_line import flag_of
from wanvram.config import RunConfig, load_config
from wanvram.errors import InputError
from wanvram.folder_lock import alone_in
from wanvram.foreign_text import quoted, shown
from wanvram.kept_state import KEPT_NAME, KeptRun, read_kept_run
from wanvram.record import RunRecord
from wanvram.request import MEDIA
from wanvram.units import seconds
from wanvram.weights.folder import GENERATED

__all__ = ["Resumption", "asked", "interrupted_run", "refuse_difference"]

MAX_CONFIG_BYTES = 8 * 1024 * 1024  # 64 prompts of 20,000 characters


@dataclass(frozen=True)
class Resumption:
    """A run that goes on in its directory, which is held. kept: None where none of its steps was kept. save_file: as it was given."""

    directory: Path
    config: RunConfig
    kept: KeptRun | None

    @property
    def save_file(self) -> Path | None:
        if self.kept is None or self.kept.save_file is None:
            return None
        return Path(self.kept.folder, self.kept.save_file)

    def outlook(self) -> str:
        """How far the run is and what is left of it, with the time of a step as it was measured."""
        videos, total = len(self.config.videos()), self.config.request.sample_steps
        made = self.kept.steps() if self.kept else {}
        left = videos * total - sum(made.values())
        if not made:
            return f"{self.directory}: no step was kept; the run begins again, all {left} steps are left"
        if not left:
            return f"{self.directory}: all {total} steps are made; decoding is left"
        begun = max(made)
        which = f" of video {begun + 1} of {videos}" if videos > 1 else ""
        each = self.kept.step_seconds if self.kept else None
        time = f", about {seconds(left * each)}" if each else ""
        return f"{self.directory}: goes on after step {made[begun]} of {total}{which}; {left} steps are left{time}, then decoding"


@contextmanager
def interrupted_run(directory: Path, *, hold: bool = True) -> Iterator[Resumption]:
    """Inside, no other run may write there. InputError where there is no run, a complete one, or one that cannot be read.

    hold: False where the first of the run's processes holds it.
    """
    what = f"--resume {shown(directory)}"
    if not directory.is_dir():
        raise InputError(f"{what}: there is no such directory; give that of an interrupted run")
    with alone_in(directory) if hold else nullcontext():
        if not (directory / "config.yaml").is_file():
            raise InputError(
                f"{what}: holds no run, for config.yaml is missing; give the directory of an interrupted run"
            )
        if _is_complete(directory / "record.json"):
            raise InputError(f"{what}: the run is complete, nothing is left to be made")
        kept = read_kept_run(directory / KEPT_NAME) if os.path.lexists(directory / KEPT_NAME) else None
        config = load_config(directory / "config.yaml", MAX_CONFIG_BYTES)
        if config.device == "simulated":
            raise InputError(f"{what}: the run is simulated, which makes no video; estimate it again")
        if kept is not None:
            refuse_difference(directory, kept.made_of, asked(config))
            config = _from_folder(config, Path(kept.folder))
        yield Resumption(directory, config, kept)


def _is_complete(record: Path) -> bool:
    """One that cannot be read was not written to its end."""
    try:
        return RunRecord.read(record).failure is None
    except InputError:
        return False


def _from_folder(config: RunConfig, folder: Path) -> RunConfig:
    """With the files where they were when the command was given, whatever folder it is given in now."""
    place = lambda name: str(folder / name)  # noqa: E731 (an absolute name stays as it is)
    request = config.request
    given = {name: getattr(request, name) for name in MEDIA if getattr(request, name)}
    found: dict[str, Any] = {n: tuple(map(place, v)) if isinstance(v, tuple) else place(v) for n, v in given.items()}
    weights = config.weights if config.weights in GENERATED else place(config.weights)
    return replace(config, weights=weights, request=replace(request, **found))


def asked(config: RunConfig) -> dict[str, Any]:
    """What of a configuration makes the video what it is, by flag. Files are told apart by what is in them, not by their names."""
    request = {name: value for name, value in asdict(config.request).items() if name not in MEDIA}
    plain = {flag_of(name): list(value) if isinstance(value, tuple) else value for name, value in request.items()}
    fixed = {knob.flag: knob.of(config.strategy) for knob in (*knobs.lossy(), knobs.ATTENTION, knobs.BATCH_SIZE)}
    return plain | fixed | {flag_of("weights"): config.weights if config.weights in GENERATED else "a checkpoint"}


def refuse_difference(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError that names the first thing in which the run as it was begun is not what is asked for now."""
    for name, value in now.items():
        if before.get(name) != value:
            was = quoted(before[name]) if name in before else "not known"
            raise InputError(
                f"--resume {shown(directory)}: {name} was {was} when the run was begun and is {quoted(value)} now, which makes "
                "another video; give it as it was, or begin a new run without --resume"
            )

"""Runs that are killed and go on: the video equals the uninterrupted one's bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from wanvram.cli.main import main
from wanvram.engine.keeping import Keeper
from wanvram.engine.pipeline import Pipeline
from wanvram.errors import OutOfMemory, OutputError
from wanvram.folder_lock import alone_in
from wanvram.kept_state import KEPT_NAME, read_kept_run
from wanvram.media.video import PictureWriter, VideoWriter
from wanvram.models.dit import WanDiT
from wanvram.record import RunRecord
from wanvram.recorder.recorder import Recorder

SEED = 20261128
STEPS = 5
SMALL = ["--size", "64*48", "--frame_num", "5", "--sample_steps", str(STEPS), "--base_seed", "3"]
TASKS = ("t2v-1.3B", "i2v-14B", "vace-1.3B", "flf2v-14B")
RESIDENT = ["--load_strategy", "full", "--weights_in", "pinned", "--resident_blocks", "0", "--offload_model", "False"]
STREAMED = ["--load_strategy", "block", "--offload_model", "True"]
STRATEGIES = (
    RESIDENT,
    STREAMED,
    [*STREAMED, "--weights_in", "disk", "--resident_blocks", "1"],
    [*STREAMED, "--cfg", "joint", "--rows_per_chunk", "37"],
)


@dataclass(frozen=True)
class Kill:
    """first, second: how the process that is killed and the one that goes on hold the weights. share: of the run's moments."""

    number: int
    task: str
    solver: str
    first: int
    second: int
    prompts: int
    share: float


def drawn(count: int) -> list[Kill]:
    rng = random.Random(SEED)
    return [
        Kill(
            number,
            TASKS[number % len(TASKS)],
            ("unipc", "dpm++")[number // len(TASKS) % 2],
            rng.randrange(len(STRATEGIES)),
            rng.randrange(len(STRATEGIES)),
            1 + (number in (8, 9)),
            rng.random(),
        )
        for number in range(count)
    ]


def command(task: str, solver: str, prompts: int, strategy: Sequence[str], folder: Path) -> list[str]:
    texts = folder / "prompts.txt"
    texts.write_text("a cat\na dog\n")
    asked = ["--prompt", "a cat"] if prompts == 1 else ["--prompt_file", str(texts)]
    kind = ["--task", task, "--sample_solver", solver]
    return ["generate", "--weights", "tiny", *kind, *SMALL, *asked, *strategy, "-o", str(folder / "run")]


Frames = dict[str, list[torch.Tensor]]


@contextmanager
def watched() -> Iterator[Frames]:
    """What is handed to the writers inside, by the file's name, before it is encoded."""
    seen: Frames = {}
    with pytest.MonkeyPatch.context() as patch:
        for writer in (VideoWriter, PictureWriter):
            write = writer.write

            def noted(self: Any, frames: torch.Tensor, write: Callable[..., None] = write) -> None:
                seen.setdefault(self.path.name, []).append(frames.clone())
                write(self, frames)

            patch.setattr(writer, "write", noted)
        yield seen


@contextmanager
def counted_spans(kill_at: int | None) -> Iterator[list[int]]:
    """The process kills itself as the stage, step or block with that number begins, from 1. No loads: they differ by strategy."""
    count = [0]
    span = Recorder.span

    def noted(self: Recorder, name: str, *, kind: str, **of: Any) -> Any:
        count[0] += kind != "load"
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return span(self, name, kind=kind, **of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "span", noted)
        yield count


def in_a_child(work: Callable[[], None]) -> int:
    """Its exit status, minus the signal that killed it. A fork: the interpreter and torch are there already."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(9)  # it was to be killed
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@dataclass(frozen=True)
class Uninterrupted:
    frames: Frames
    files: dict[str, bytes]
    spans: int
    record: RunRecord


@cache
def uninterrupted(task: str, solver: str, prompts: int) -> Uninterrupted:
    folder = FOLDERS[0] / f"{task}-{solver.strip('+')}-{prompts}"
    folder.mkdir()
    with watched() as frames, counted_spans(None) as count:
        assert main(command(task, solver, prompts, RESIDENT, folder)) == 0
    return Uninterrupted(frames, videos_of(folder / "run"), count[0], RunRecord.read(folder / "run" / "record.json"))


def videos_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("video*.mp4")}


FOLDERS: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    FOLDERS[:] = [tmp_path_factory.mktemp("uninterrupted")]
    uninterrupted.cache_clear()


def same(frames: Frames, expected: Frames) -> bool:
    """Of the files that were made again, every frame."""
    return all(
        len(pieces) == len(expected[name]) and all(map(torch.equal, pieces, expected[name]))
        for name, pieces in frames.items()
    )


@pytest.mark.parametrize("kill", drawn(20), ids=lambda kill: f"{kill.number}-{kill.task}-{kill.solver}")
def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_video_bit_for_bit(kill: Kill, tmp_path: Path) -> None:
    usual = uninterrupted(kill.task, kill.solver, kill.prompts)
    begin = command(kill.task, kill.solver, kill.prompts, STRATEGIES[kill.first], tmp_path)
    moment = 1 + int(kill.share * usual.spans)

    def first() -> None:
        with counted_spans(moment):
            main([*begin, "--keep_every", "1"])

    assert in_a_child(first) == -signal.SIGKILL
    run = tmp_path / "run"
    steps = read_kept_run(run / KEPT_NAME).steps()
    with watched() as frames:
        assert main(["generate", "--resume", str(run), *STRATEGIES[kill.second]]) == 0
    assert same(frames, usual.frames)
    assert videos_of(run) == usual.files
    assert not list(run.glob(".*")) + list(run.glob(KEPT_NAME))
    record = RunRecord.read(run / "record.json")
    assert record.resumed is not None
    assert record.resumed.steps == tuple(steps.get(number, 0) for number in range(kill.prompts))
    made = sum(s.repeats for stage in record.stages if stage.part == "denoise" for s in stage.children)
    assert made == STEPS * kill.prompts - sum(steps.values())

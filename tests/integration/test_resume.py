"""Runs that are killed and go on: the video equals the uninterrupted one's bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
import random
import shutil
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
from PIL import Image

from checkpoints import tiny_models, write_download
from wanvram import kept_state
from wanvram.cli.main import main
from wanvram.config import load_config
from wanvram.errors import OutOfMemory, OutputError
from wanvram.folder_lock import alone_in
from wanvram.kept_state import KEPT_NAME, KeptRun, KeptVideo, read_kept_run, write_kept
from wanvram.media.video import PictureWriter, VideoWriter
from wanvram.models.dit import WanDiT
from wanvram.record import Resumed, RunRecord
from wanvram.recorder.recorder import Recorder
from wanvram.run import keep
from wanvram.run.outputs import Outputs

SEED = 20261128
STEPS = 5
SMALL = ["--size", "32*32", "--frame_num", "5", "--sample_steps", str(STEPS), "--base_seed", "3"]
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
    """The process kills itself as the stage or step with that number begins, from 1: those that all strategies have."""
    count = [0]
    span = Recorder.span

    def noted(self: Recorder, name: str, *, kind: str, **of: Any) -> Any:
        count[0] += kind in ("stage", "step")
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
    uninterrupted_batch.cache_clear()


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
    moment = 1 + int(0.9 * kill.share * usual.spans)  # the end, of saving, has tests of its own

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


# --- other moments, other endings ----------------------------------------------------------------------------------------------


def killed_at_call(owner: Any, name: str, number: int, work: Sequence[str], *, after: bool = False) -> None:
    """Runs the command in a child that kills itself as that function is called for the time with that number, or has returned."""
    calls = [0]
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def killed() -> None:
        setattr(owner, name, noted)
        main([*work, "--keep_every", "1"])

    assert in_a_child(killed) == -signal.SIGKILL


def resumed(run: Path, *flags: str) -> Frames:
    with watched() as frames:
        assert main(["generate", "--resume", str(run), *flags]) == 0
    return frames


MOMENTS = [
    (WanDiT, "velocity", 6, False, 2),  # in the third step
    (kept_state.os, "fsync", 6, False, 2),  # while the third step is being written: before are the start and two texts
    (kept_state.os, "fsync", 6, True, 2),  # it is written whole, and has not its name yet
    (VideoWriter, "write", 2, False, STEPS),
    (Outputs, "_sidecar", 1, False, STEPS),  # the video is whole, its description is missing
]


@pytest.mark.parametrize(("owner", "name", "number", "after", "steps"), MOMENTS)
def test_a_kill_at_the_worst_moments_leaves_what_can_be_gone_on_with(
    owner: Any, name: str, number: int, after: bool, steps: int, tmp_path: Path
) -> None:
    usual = uninterrupted("t2v-1.3B", "unipc", 1)
    killed_at_call(owner, name, number, command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path), after=after)
    run = tmp_path / "run"
    assert read_kept_run(run / KEPT_NAME).steps() == {0: steps}
    frames = resumed(run)
    assert frames.keys() == usual.frames.keys()
    assert same(frames, usual.frames)
    assert videos_of(run) == usual.files
    assert not list(run.glob(".*"))
    record = RunRecord.read(run / "record.json")
    assert [s.part for s in record.stages if s.part == "encode_text"] == ([] if steps == STEPS else ["encode_text"])


def test_finished_videos_of_several_are_not_made_again(tmp_path: Path) -> None:
    usual = uninterrupted("t2v-1.3B", "unipc", 2)
    killed_at_call(Outputs, "_sidecar", 2, command("t2v-1.3B", "unipc", 2, RESIDENT, tmp_path))
    run = tmp_path / "run"
    first = (run / "video-001.mp4").stat()
    frames = resumed(run)
    assert list(frames) == ["video-002.mp4"]
    assert same(frames, usual.frames)
    assert videos_of(run) == usual.files
    assert (run / "video-001.mp4").stat().st_mtime_ns == first.st_mtime_ns
    assert RunRecord.read(run / "record.json").resumed == Resumed((STEPS, STEPS), (0,))


# Two videos denoised together, a step is four forwards: two of the first video, two of the second.
BATCHES = {"seeds": (1, ["--batch_size", "2"]), "prompts": (2, ["--batch_size", "2"])}


@cache
def uninterrupted_batch(kind: str) -> tuple[Frames, dict[str, bytes]]:
    prompts, flags = BATCHES[kind]
    folder = FOLDERS[0] / f"batch-{kind}"
    folder.mkdir()
    with watched() as frames:
        assert main([*command("t2v-1.3B", "unipc", prompts, RESIDENT, folder), *flags]) == 0
    return frames, videos_of(folder / "run")


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_killed_inside_a_step_goes_on_with_every_video_from_where_it_was_kept(
    kind: str, tmp_path: Path
) -> None:
    prompts, flags = BATCHES[kind]
    killed_at_call(WanDiT, "velocity", 11, [*command("t2v-1.3B", "unipc", prompts, RESIDENT, tmp_path), *flags])
    run = tmp_path / "run"
    assert read_kept_run(run / KEPT_NAME).steps() == {0: 2, 1: 2}
    assert same(resumed(run, *STREAMED, "--micro_batch_size", "2"), uninterrupted_batch(kind)[0])
    assert videos_of(run) == uninterrupted_batch(kind)[1]


def test_a_batch_that_ends_inside_a_step_goes_on_with_one_video_a_step_ahead(tmp_path: Path) -> None:
    calls = []

    def full(self: WanDiT, *args: Any, velocity: Any = WanDiT.velocity, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 11:
            raise OutOfMemory("no more", requested_bytes=1, allocated_bytes=2, reserved_bytes=3)
        return velocity(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanDiT, "velocity", full)
        assert main([*command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path), *BATCHES["seeds"][1]]) == 1
    run = tmp_path / "run"
    assert read_kept_run(run / KEPT_NAME).steps() == {0: 3, 1: 2}
    assert same(resumed(run), uninterrupted_batch("seeds")[0])
    assert videos_of(run) == uninterrupted_batch("seeds")[1]


def test_finished_videos_of_a_batch_are_not_made_again_and_no_earlier_one_passes_for_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "video-003.json", "video-003.mp4"):  # of an earlier run that --force replaces
        (run / name).touch()
    work = [*command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path), "--batch_size", "3", "--force"]
    killed_at_call(Outputs, "_sidecar", 3, work)
    frames = resumed(run)
    assert list(frames) == ["video-003.mp4"]
    assert RunRecord.read(run / "record.json").resumed == Resumed((STEPS,) * 3, (0, 1))
    expected = uninterrupted_batch("seeds")[1]
    assert {name: content for name, content in videos_of(run).items() if name in expected} == expected


def test_a_run_killed_again_and_again_arrives(tmp_path: Path) -> None:
    usual = uninterrupted("t2v-1.3B", "dpm++", 1)
    work = command("t2v-1.3B", "dpm++", 1, RESIDENT, tmp_path)
    run = tmp_path / "run"
    for step in range(1, STEPS):
        killed_at_call(WanDiT, "velocity", 4 if step > 1 else 3, work)
        assert read_kept_run(run / KEPT_NAME).steps() == {0: step}
        work = ["generate", "--resume", str(run)]
    assert same(resumed(run), usual.frames)
    assert videos_of(run) == usual.files
    names = [event["name"] for event in json.loads((run / "memory_events.json").read_text())]
    assert [name for name in names if name.startswith("step")] == [f"step {n}" for n in range(STEPS)]
    assert names.count("encode_text: start") == STEPS


def test_after_running_out_of_memory_another_lossless_strategy_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = uninterrupted("t2v-1.3B", "unipc", 1)
    calls = []

    def full(self: WanDiT, *args: Any, velocity: Any = WanDiT.velocity, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 6:
            raise OutOfMemory("no more", requested_bytes=1, allocated_bytes=2, reserved_bytes=3)
        return velocity(self, *args, **kwargs)

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanDiT, "velocity", full)
        assert main(command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path)) == 1
    assert f"wanvram generate --resume {run} goes on with it" in capsys.readouterr().err
    assert same(resumed(run, *STREAMED), usual.frames)
    assert "after step 3 of 5; 2 steps are left, about" in capsys.readouterr().err.splitlines()[0]
    assert RunRecord.read(run / "record.json").failure is None
    assert load_config(run / "config.yaml").strategy.load_strategy == "block"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_keeps_its_last_step(sent: signal.Signals, tmp_path: Path) -> None:
    usual = uninterrupted("t2v-1.3B", "unipc", 1)
    run = tmp_path / "run"
    calls = []

    def ended(self: WanDiT, *args: Any, velocity: Any = WanDiT.velocity, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), sent)
        return velocity(self, *args, **kwargs)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a suite in the background is deaf to it, and so would the run be
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WanDiT, "velocity", ended)
            assert main(command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path)) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    failure = RunRecord.read(run / "record.json").failure
    assert failure is not None
    assert failure.kind == "interrupted"
    assert read_kept_run(run / KEPT_NAME).steps() in ({0: 3}, {0: 4})  # it is noticed between two blocks or steps
    assert same(resumed(run), usual.frames)
    assert videos_of(run) == usual.files


def test_a_killed_command_goes_on_in_a_new_process(tmp_path: Path) -> None:
    usual = uninterrupted("t2v-1.3B", "unipc", 1)
    run = tmp_path / "run"
    work = [*command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path), "--keep_every", "1"]
    python = [sys.executable, "-m", "wanvram"]
    process = subprocess.Popen([*python, *work], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((run / KEPT_NAME).exists() and read_kept_run(run / KEPT_NAME).videos):
        time.sleep(0.01)
    process.kill()
    process.wait(60)
    again = subprocess.run([*python, "generate", "--resume", str(run)], capture_output=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert videos_of(run) == usual.files


# --- when it is kept -----------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_where_that_is_asked_for_and_the_run_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = uninterrupted("t2v-1.3B", "unipc", 1)
    work = [*command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path), "--keep_every", "0"]
    killed_at_call(WanDiT, "velocity", 9, work[:-2])
    assert read_kept_run(tmp_path / "run" / KEPT_NAME).steps() == {0: 4}
    capsys.readouterr()

    def killed() -> None:
        with counted_spans(usual.spans - 3):
            main([*work, "--force"])

    assert in_a_child(killed) == -signal.SIGKILL
    assert read_kept_run(tmp_path / "run" / KEPT_NAME).steps() == {}
    assert same(resumed(tmp_path / "run"), usual.frames)
    said = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'run'}: no step was kept; the run begins again, all 5 steps are left" in said


def test_a_short_run_keeps_what_decoding_begins_with_and_removes_it_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def noted(path: Path, run: KeptRun, videos: Sequence[KeptVideo]) -> None:
        written.append([(video.number, video.steps, sorted(video.tensors)) for video in videos])
        write_kept(path, run, videos)

    monkeypatch.setattr(keep, "write_kept", noted)
    assert main(command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path)) == 0
    assert written == [[], [(0, STEPS, ["latent"])]]
    assert not (tmp_path / "run" / KEPT_NAME).exists()


def test_a_disk_that_takes_no_more_costs_what_can_be_resumed_and_not_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, run: KeptRun, videos: Sequence[KeptVideo]) -> None:
        if videos:
            raise OutputError(f"cannot write {path}: No space left on device")
        write_kept(path, run, videos)

    monkeypatch.setattr(keep, "write_kept", full)
    assert main([*command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path), "--keep_every", "1"]) == 0
    record = RunRecord.read(tmp_path / "run" / "record.json")
    assert any("No space left on device; an interruption costs" in note for note in record.notes)
    assert videos_of(tmp_path / "run") == uninterrupted("t2v-1.3B", "unipc", 1).files


def test_a_simulated_run_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["generate", "--weights", "tiny", *SMALL, "--device", "simulated", "-o", str(run)]) == 0
    assert not (run / KEPT_NAME).exists()
    (run / "record.json").unlink()
    assert main(["generate", "--resume", str(run)]) == 2
    assert "the run is simulated, which makes no video" in capsys.readouterr().err


# --- where it is not the same run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of i2v after two steps, with a picture, begun in another folder with relative paths and a file to save in."""
    folder = tmp_path_factory.mktemp("interrupted")
    Image.new("RGB", (64, 48), (200, 100, 50)).save(folder / "cat.png")
    work = [*command("i2v-14B", "unipc", 1, RESIDENT, folder)[:-2], "-o", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        killed_at_call(WanDiT, "velocity", 5, [*work, "--image", "cat.png", "--save_file", "cat.mp4"])
    return folder


DIFFERENT = [
    (["--prompt", "a dog"], "--prompt was 'a cat' when the run was begun and is 'a dog' now"),
    (["--base_seed", "4"], "--base_seed was 3 when the run was begun and is 4 now"),
    (["--size", "32*48"], "--size was '32*32'"),
    (["--frame_num", "9"], "--frame_num was 5"),
    (["--sample_steps", "6"], "--sample_steps was 5"),
    (["--sample_shift", "2"], "--sample_shift was"),
    (["--sample_guide_scale", "2"], "--sample_guide_scale was 5"),
    (["--sample_solver", "dpm++"], "--sample_solver was 'unipc'"),
    (["--negative_prompt", "x"], "--negative_prompt was"),
    (["--precision", "bf16"], "--precision was 'fp32'"),
    (["--vae_precision", "bf16"], "--vae_precision was 'fp32'"),
    (["-o", "elsewhere"], "--output: the run of --resume has its own"),
    (["--save_file", "dog.mp4"], "--save_file: the run of --resume has its own"),
    (["--config", "x.yaml"], "--config: the run of --resume has its own"),
    (["--force"], "--force: the run of --resume has its own"),
    (["--keep_every", "-1"], "--keep_every: -1 must be at least 0"),
]


def told_of(run: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said where going on is refused, which changes nothing in the directory."""
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert main(["generate", "--resume", str(run), *flags]) == 2
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("flags", "sentence"), DIFFERENT, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_what_changes_the_video_is_refused_by_its_name(
    flags: list[str], sentence: str, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in told_of(interrupted / "run", *flags, capsys=capsys)


def test_another_picture_under_the_same_name_is_refused_and_the_same_one_elsewhere_goes_on(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(interrupted, folder)
    picture = (interrupted / "cat.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), (0, 100, 50)).save(interrupted / "cat.png")
    try:
        assert "what --image names was '" in told_of(folder / "run", capsys=capsys)
    finally:
        (interrupted / "cat.png").write_bytes(picture)
    frames = resumed(folder / "run", "--image", "moved/cat.png")
    assert list(frames) == ["cat.mp4"]
    (interrupted / "cat.mp4").unlink()  # where the first command was to save it
    assert sorted(path.name for path in interrupted.iterdir() if path.name.startswith("cat.")) == [
        "cat.json",
        "cat.png",
    ]


def test_another_checkpoint_under_the_same_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = [
        "generate",
        "--task",
        "t2v-1.3B",
        "--device",
        "cpu",
        "--sample_steps",
        "2",
        "--frame_num",
        "5",
        "--base_seed",
        "1",
    ]
    checkpoint, run = tmp_path / "checkpoint", tmp_path / "run"
    checkpoint.mkdir()
    with tiny_models():
        write_download(checkpoint, "tiny-t2v", sharded=True)
        work += ["--ckpt_dir", str(checkpoint), "--size", "832*480", "--prompt", "a cat"]
        killed_at_call(WanDiT, "velocity", 3, [*work, "-o", str(run)])
        (weights,) = checkpoint.glob("*00001*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(data)
        assert "what is in the files of the dit was '" in told_of(run, capsys=capsys)


def test_another_version_or_device_is_refused(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keep, "__version__", "0.0.0")
    assert "the version of wanvram was '" in told_of(interrupted / "run", capsys=capsys)


def test_what_is_no_interrupted_run_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--resume", str(tmp_path / "none")]) == 2
    assert "there is no such directory" in capsys.readouterr().err
    assert "holds no run, for config.yaml is missing" in told_of(tmp_path, capsys=capsys)


def test_a_complete_run_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    uninterrupted("t2v-1.3B", "unipc", 1)
    run = FOLDERS[0] / "t2v-1.3B-unipc-1" / "run"
    capsys.readouterr()
    assert "the run is complete, nothing is left to be made" in told_of(run, capsys=capsys)


def test_a_directory_in_which_another_process_works_is_left_alone(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone_in(interrupted / "run"):
        assert "another wanvram is writing to" in told_of(interrupted / "run", capsys=capsys)


def test_a_run_that_is_there_can_be_replaced_or_gone_on_with(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupted / "run"
    assert main(["generate", "--weights", "tiny", "--prompt", "x", "-o", str(run)]) == 2
    assert f"--force to replace it, --resume {run} to go on with it or -o DIR" in capsys.readouterr().err


def test_an_older_file_that_the_run_may_replace_is_never_taken_for_its_own(tmp_path: Path) -> None:
    usual = uninterrupted("t2v-1.3B", "unipc", 1)
    (tmp_path / "cat.mp4").write_bytes(b"an older video")
    (tmp_path / "cat.json").write_text("{}")
    work = [*command("t2v-1.3B", "unipc", 1, RESIDENT, tmp_path), "--save_file", str(tmp_path / "cat.mp4"), "--force"]
    killed_at_call(VideoWriter, "write", 2, work)
    resumed(tmp_path / "run")
    assert (tmp_path / "cat.mp4").read_bytes() == usual.files["video.mp4"]


# --- damaged files -------------------------------------------------------------------------------------------------------------


def rewritten(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """With another header: `change` is given it and what it tells of the run."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = json.loads(header["__metadata__"]["wanvram"])
    change(header, told)
    header["__metadata__"]["wanvram"] = json.dumps(told)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _set(where: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, told: told["videos"][0].update({where: value})


def _tensor(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, told: header["0.latent"].update(changes)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-5],
    "header only": lambda data: data[:100],
    "longer": lambda data: data + b"\0" * 8,
    "huge header": lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
    "foreign": lambda data: b"PK\x03\x04" + data,
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "no json": lambda data: data[:8] + b"}" + data[9:],
    "NaN step": lambda data: rewritten(data, _set("steps", float("nan"))),
    "step -1": lambda data: rewritten(data, _set("steps", -1)),
    "step 1e400": lambda data: rewritten(data, _set("steps", 10**400)),
    "step 99": lambda data: rewritten(data, _set("steps", 99)),
    "step text": lambda data: rewritten(data, _set("steps", "2")),
    "video 7": lambda data: rewritten(data, lambda header, told: told["videos"][0].update(number=7)),
    "no tensors": lambda data: rewritten(data, _set("sums", {})),
    "another dtype": lambda data: rewritten(data, _tensor(dtype="BF16")),
    "another shape": lambda data: rewritten(data, lambda header, told: header["0.latent"]["shape"].reverse()),
    "a vast shape": lambda data: rewritten(data, _tensor(shape=[1 << 20] * 4)),
    "another place": lambda data: rewritten(data, _tensor(data_offsets=[4, 8])),
    "deep": lambda data: rewritten(data, lambda header, told: told.update(made_of={"x": "[" * 3000})),
    "another schema": lambda data: rewritten(data, lambda header, told: told.update(schema=2)),
    "no prompts": lambda data: rewritten(data, lambda header, told: told.update(prompts=3)),
    "another video": lambda data: rewritten(data, lambda header, told: told["made_of"].update({"--prompt": "x"})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_state_is_a_sentence(
    damage: str, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(interrupted / "run", tmp_path / "run")
    path = tmp_path / "run" / KEPT_NAME
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    said = told_of(tmp_path / "run", capsys=capsys).splitlines()[-1]
    assert said.startswith("wanvram: ")
    assert KEPT_NAME in said or "makes another video" in said

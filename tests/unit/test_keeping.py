"""When a run's state is kept, what a solver's state holds, and the file in which it lies."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from wanvram.engine import keeping
from wanvram.engine.devices import CpuDevice
from wanvram.engine.keeping import Keeper
from wanvram.errors import InputError, OutputError
from wanvram.kept_state import KEPT_NAME, KeptRun, KeptVideo, read_kept_run, read_kept_videos, write_kept
from wanvram.recorder.event_file import ListFile
from wanvram.recorder.events import EventLog
from wanvram.sampling import Solver, SolverState, held_after, solve, timesteps_and_sigmas
from wanvram.spans import Memory

SHAPE = (4, 2, 3, 5)
RUN = KeptRun("/somewhere", None, {"--prompt": "a cat"}, ("a cat", "Katze \u732b"), 1.5)


def velocity(latent: torch.Tensor, timestep: int) -> torch.Tensor:
    return torch.tanh(latent * (1 + timestep / 1000))


def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))


# --- solvers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("stop", range(1, 7))
def test_a_trajectory_goes_on_from_what_is_held_after_any_step_bit_for_bit(solver: Solver, stop: int) -> None:
    schedule = timesteps_and_sigmas(solver, 7, 5.0)
    whole = list(solve(solver, velocity, noise(), schedule))
    state = SolverState(0, noise())
    first = solve(solver, velocity, noise(), schedule, state)
    for _ in range(stop):
        next(first)
    assert not state.changing
    held = {name: state.tensors()[name].clone() for name in held_after(solver, stop, 7)}
    rest = list(solve(solver, velocity, noise(), schedule, SolverState.of(stop, held)))
    assert len(rest) == 7 - stop
    assert all(map(torch.equal, rest, whole[stop:]))


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_after_the_last_step_the_latent_is_all_that_is_held(solver: Solver) -> None:
    assert held_after(solver, 3, 3) == ("latent",)
    state = SolverState(3, noise())
    assert list(solve(solver, velocity, noise(), timesteps_and_sigmas(solver, 3, 5.0), state)) == []


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_state_left_by_an_exception_within_the_solver_says_that_it_is_half_a_step(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SolverState(0, noise())
    trajectory = solve(solver, velocity, noise(), timesteps_and_sigmas(solver, 5, 5.0), state)
    next(trajectory)
    module = sys.modules[f"wanvram.sampling.{solver.replace('+', 'p')}"]  # its function has the same name
    monkeypatch.setattr(module, "weighted_sum", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        next(trajectory)
    assert state.changing
    written: list[object] = []
    keeper = Keeper(lambda *kept: written.append(kept))
    keeper._running, keeper._is_news = {0: state}, True
    keeper.interrupted(CpuDevice())
    assert written == []


# --- when ----------------------------------------------------------------------------------------------------------------------


class Times:
    """A clock that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(keeping.time, "monotonic", lambda: self.now)


def kept_steps(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int, every: int | None) -> list[int]:
    """After which steps of so many seconds it is kept."""
    clock, kept = Times(monkeypatch), []

    def write(videos: Sequence[KeptVideo], prompts: Sequence[str], step_seconds: float | None) -> None:
        kept.append(videos[0].steps)
        assert step_seconds == pytest.approx(seconds)
        assert prompts == ("a cat",)

    keeper = Keeper(write, every, prompts=("a cat",))
    state = keeper.begin(0, noise(), CpuDevice())
    keeper.begin_steps()
    for made in range(1, steps + 1):
        clock.now += seconds
        state.made = made
        keeper.after_step(made, CpuDevice())
    return kept


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1.0, [120, 240]), (50.0, [2, 4, 6]), (90.0, [1, 2, 3]), (400.0, [1, 2, 3])],
    ids=["many a time", "two", "each", "each of long ones"],
)
def test_by_default_it_is_kept_about_every_two_minutes(
    seconds: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_steps(monkeypatch, seconds, expected[-1], None) == expected


def test_it_is_kept_every_so_many_steps_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_steps(monkeypatch, 1.0, 7, 3) == [3, 6]
    assert kept_steps(monkeypatch, 1000.0, 7, 0) == []


def test_what_another_process_kept_of_other_videos_is_kept_on() -> None:
    written: list[list[tuple[int, int]]] = []
    earlier = [KeptVideo(0, 5, {"latent": noise().numpy()}), KeptVideo(2, 3, {"latent": noise().numpy()})]
    keeper = Keeper(lambda videos, *_: written.append([(v.number, v.steps) for v in videos]), 1, earlier)
    assert [keeper.steps_kept(number) for number in range(3)] == [5, 0, 3]
    assert keeper.take_finished(3, 5) == []
    assert torch.equal(keeper.finished(0), noise())
    state = keeper.begin(1, noise(), CpuDevice())
    state.made = 1
    keeper.after_step(1, CpuDevice())
    assert written == [[(0, 5), (1, 1), (2, 3)]]


def test_a_disk_that_is_full_is_told_once_and_does_not_end_the_run() -> None:
    def full(*_: object) -> None:
        raise OutputError("cannot write kept.safetensors: No space left on device")

    keeper = Keeper(full, 1)
    keeper.begin(0, noise(), CpuDevice()).made = 1
    keeper.after_step(1, CpuDevice())
    assert keeper.lost is not None
    assert "No space left on device" in keeper.lost


# --- the file ------------------------------------------------------------------------------------------------------------------


def written(path: Path) -> Path:
    values = {name: noise().numpy() + number for number, name in enumerate(held_after("unipc", 3, 9))}
    write_kept(path / KEPT_NAME, RUN, [KeptVideo(0, 9, {"latent": values["latent"]}), KeptVideo(1, 3, values)])
    return path / KEPT_NAME


def test_what_is_written_is_read_again_and_is_a_safetensors_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    run = read_kept_run(path)
    assert (run.folder, run.made_of, run.prompts, run.step_seconds) == (RUN.folder, RUN.made_of, RUN.prompts, 1.5)
    assert run.steps() == {0: 9, 1: 3}
    first, second = read_kept_videos(path, SHAPE)
    assert (first.number, first.steps, list(first.tensors)) == (0, 9, ["latent"])
    assert np.array_equal(second.tensors["clean"], noise().numpy() + 2)
    others = load_file(path)
    assert sorted(others) == ["0.latent", "1.clean", "1.corrected", "1.latent", "1.previous"]
    assert np.array_equal(others["1.latent"], second.tensors["latent"])


def test_values_that_are_no_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    odd = np.full(SHAPE, np.nan, dtype=np.float32)
    odd[0, 0, 0] = [np.inf, -np.inf, -0.0, 1e-45, 3.4e38]
    write_kept(tmp_path / KEPT_NAME, RUN, [KeptVideo(0, 1, {"latent": odd})])
    (video,) = read_kept_videos(tmp_path / KEPT_NAME, SHAPE)
    assert video.tensors["latent"].tobytes() == odd.tobytes()


def test_latents_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"0\.latent has the shape \[4, 2, 3, 5\], the latent of this run \[4, 2, 5, 3\]"
    ):
        read_kept_videos(written(tmp_path), (4, 2, 5, 3))


def test_half_a_file_never_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left on device"):
        write_kept(path, RUN, [])
    assert [file.name for file in tmp_path.iterdir()] == [KEPT_NAME]
    assert path.read_bytes() == before


@settings(max_examples=300)
@given(data=st.data())
def test_a_file_with_any_bytes_changed_or_cut_is_read_as_it_was_or_refused(
    data: st.DataObject, whole: bytes, place: Path
) -> None:
    changed = bytearray(whole)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header + 40))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    place.write_bytes(changed[:cut])
    try:
        read_kept_run(place)
        videos = read_kept_videos(place, SHAPE)
    except InputError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert str(place) in said
        return
    assert all(video.number >= 0 and video.steps >= 1 for video in videos)
    read = b"".join(array.tobytes() for video in videos for array in video.tensors.values())
    assert read == whole[header:][: len(read)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / KEPT_NAME


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("whole")).read_bytes()


# --- events that go on ---------------------------------------------------------------------------------------------------------


def test_events_of_a_run_that_goes_on_follow_those_before(tmp_path: Path) -> None:
    path = tmp_path / "memory_events.json"
    memory = Memory(1, 2, None)
    before = EventLog(path)
    before.log("first", memory)  # and it is killed: the list has its room and is not closed
    with EventLog(path, goes_on=True) as log:
        log.log("second", memory)
        assert [event["name"] for event in json.loads(path.read_text())] == ["first", "second"]
        log.log("third", memory)
    assert [event["name"] for event in json.loads(path.read_text())] == ["first", "second", "third"]
    with EventLog(tmp_path / "none.json", goes_on=True) as log:
        log.log("alone", memory)
    assert len(json.loads((tmp_path / "none.json").read_text())) == 1


@pytest.mark.parametrize("content", ["{}", "[1, 2", "", "no list", "[" * 100_000])
def test_what_is_no_list_is_left_as_it_is_and_the_events_go_to_the_next_number(content: str, tmp_path: Path) -> None:
    path = tmp_path / "memory_events.json"
    path.write_text(content)
    with EventLog(path, goes_on=True) as log:
        log.log("second", Memory(1, 2, None))
    assert path.read_text() == content
    assert len(json.loads((tmp_path / "memory_events-2.json").read_text())) == 1


def test_a_list_that_goes_on_is_whole_after_every_item(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[]\n")
    file = ListFile(path, goes_on=True)
    for count in range(1, 300):
        file.append(json.dumps({"number": count, "text": "x" * 40}))
        assert len(json.loads(path.read_text())) == count
    file.close()

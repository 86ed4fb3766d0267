"""MemoryProfiler inside other people's programs: threads, tasks, forks, generators, exceptions; what is theirs stays theirs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from wanvram import MemoryProfiler, MemoryTracker
from wanvram.errors import OutputError
from wanvram.recorder.meters import CpuMeter

MIB = 2**20
cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts CPU tensors; here MemoryProfiler watches the GPU"
)


def names(directory: Path, file: str = "memory_events.json") -> list[str]:
    return [event["name"] for event in json.loads((directory / file).read_text(encoding="utf-8"))]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- at once ----------------------------------------------------------------------------------------------------------


def test_eight_threads_lose_no_event_and_the_program_s_files_stay_its_own(tmp_path: Path) -> None:
    going, damaged = [True], []
    content = b"U" * 5000

    def user(number: int) -> None:
        path = tmp_path / f"user{number}"
        while going[0]:
            path.write_bytes(content)
            if path.read_bytes() != content:
                damaged.append(path)

    users = [threading.Thread(target=user, args=(number,)) for number in range(2)]
    for thread in users:
        thread.start()
    profiler = MemoryProfiler("x", tmp_path / "out")
    profiler.start_profiling()

    def work(thread: int) -> None:
        for number in range(150):
            profiler.log_event(f"{thread}:{number}", {"pad": "x" * (number % 5 * 900)})

    in_threads(8, work)
    profiler.stop_profiling()
    going[0] = False
    for thread in users:
        thread.join()
    assert damaged == []
    assert sorted(names(tmp_path / "out")) == sorted(f"{t}:{n}" for t in range(8) for n in range(150))
    assert profiler.events == json.loads((tmp_path / "out" / "memory_events.json").read_text())


def test_stages_of_eight_threads_are_each_logged_and_children_of_their_own_thread_s(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:

        def work(thread: int) -> None:
            for number in range(25):
                with profiler.stage(f"outer {thread}:{number}"), profiler.stage(f"inner {thread}:{number}"):
                    pass

        in_threads(8, work)
    assert Counter(name.split()[0] for name in names(tmp_path)) == {"outer": 200, "inner": 200}
    assert len(profiler.stages) == 200
    assert all([c.name for c in s.children] == [s.name.replace("outer", "inner")] for s in profiler.stages)


@cpu_only
def test_stages_of_interleaved_tasks_know_their_own_children_and_every_peak(tmp_path: Path) -> None:
    async def task(number: int) -> None:
        with profiler.stage(f"task {number}"):
            await asyncio.sleep(0.001 * (5 - number))
            with profiler.stage(f"part {number}"):
                await asyncio.sleep(0.001 * number)
                torch.ones((number + 1) * MIB // 4)

    async def main() -> None:
        await asyncio.gather(*(task(number) for number in range(5)))

    with MemoryProfiler("x", tmp_path) as profiler:
        asyncio.run(main())
    assert sorted(names(tmp_path)) == sorted(f"{kind} {number}" for kind in ("task", "part") for number in range(5))
    assert {s.name: [c.name for c in s.children] for s in profiler.stages} == {
        f"task {number}": [f"part {number}"] for number in range(5)
    }
    for number, stage in enumerate(sorted(profiler.stages, key=lambda s: s.name)):
        assert stage.children[0].activation_bytes >= (number + 1) * MIB
        assert stage.peak.allocated_bytes >= stage.children[0].peak.allocated_bytes


@cpu_only
def test_stages_of_generators_may_end_in_any_order(tmp_path: Path) -> None:
    def work(name: str, size: int) -> Iterator[None]:
        with profiler.stage(name):
            yield
            torch.ones(size * MIB // 4)
            yield

    with MemoryProfiler("x", tmp_path) as profiler:
        first, second, closed = work("first", 8), work("second", 2), work("closed", 1)
        for generator in (first, second, closed, first):
            next(generator)
        assert list(first) == []
        next(second)
        assert list(second) == []
        with profiler.stage("inside closed"):
            pass
        closed.close()
        with profiler.stage("after"):
            pass
    assert names(tmp_path) == ["first", "second", "inside closed", "closed", "after"]
    spans = {span.name: span for span in profiler.stages}
    assert {"first", "closed", "after"} <= set(spans)
    assert [child.name for child in spans["closed"].children] == ["inside closed"]
    assert spans["first"].activation_bytes == 8 * MIB


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_leaves_the_parent_s_files_alone(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        profiler.log_event("parent")
        child = os.fork()
        if child == 0:
            try:
                with profiler.stage("child's stage"):
                    profiler.log_event("child")
                profiler.stop_profiling()
            finally:
                os._exit(0)
        silent = os.fork()
        if silent == 0:
            try:
                profiler.stop_profiling()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == os.waitpid(silent, 0)[1] == 0
        profiler.log_event("parent again")
    assert names(tmp_path) == ["parent", "parent again"]
    assert names(tmp_path, "memory_events-2.json") == ["child", "child's stage"]
    assert len(json.loads((tmp_path / "memory_log.json").read_text())) == 2
    files = {"memory_events.json", "memory_events-2.json", "memory_log.json", "memory_log-2.json"}
    assert {path.name for path in tmp_path.iterdir()} == files


# --- what was there ---------------------------------------------------------------------------------------------------


def test_a_second_profiler_leaves_the_first_one_s_events_and_numbers_its_own(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        with MemoryProfiler(name, tmp_path) as profiler:
            profiler.log_event(name)
            path = profiler.save_events()
        assert [event["name"] for event in json.loads(path.read_text())] == [name]
    MemoryProfiler("logs nothing", tmp_path)
    assert names(tmp_path) == ["first"]
    assert names(tmp_path, "memory_events-3.json") == ["third"]
    assert (tmp_path / "memory_log-3.json").exists()


def test_a_tracker_writes_again_what_it_wrote_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "memory_log.json").write_text("mine")
    tracker = MemoryTracker(tmp_path)
    for count in (1, 2):
        tracker.read()
        path = tracker.save_logs()
        assert path == tmp_path / "memory_log-2.json"
        assert len(json.loads(path.read_text())) == count
    assert (tmp_path / "memory_log.json").read_text() == "mine"


def test_a_program_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with MemoryProfiler("x", "out") as profiler:
        monkeypatch.chdir("elsewhere")
        for _ in range(40):
            profiler.log_event("x", {"pad": "x" * 500})
    assert len(names(tmp_path / "out")) == 40
    assert os.listdir(tmp_path / "elsewhere") == []


# --- the program's exceptions -----------------------------------------------------------------------------------------


class Mine(Exception):
    pass


@pytest.mark.parametrize("error", [Mine, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
@pytest.mark.parametrize("filter_", ["ignore", "error"])
def test_the_program_s_exception_passes_when_the_folder_is_gone(
    error: type[BaseException], filter_: Any, tmp_path: Path
) -> None:
    raised = error("mine")
    with warnings.catch_warnings(), pytest.raises(error) as found:  # noqa: PT012
        warnings.simplefilter(filter_)
        with MemoryProfiler("x", tmp_path / "out") as profiler, profiler.stage("s"):
            shutil.rmtree(tmp_path / "out")
            raise raised
    assert found.value is raised
    assert CpuMeter not in [type(mode) for mode in _get_current_dispatch_mode_stack()]


def test_what_could_not_be_written_is_a_warning_beside_the_program_s_exception_and_an_error_without_one(
    tmp_path: Path,
) -> None:
    with (  # noqa: PT012
        warnings.catch_warnings(record=True) as said,
        pytest.raises(Mine),
        MemoryProfiler("x", tmp_path / "a") as profiler,
    ):
        warnings.simplefilter("always")
        try:
            raise Mine
        except Mine:
            shutil.rmtree(tmp_path / "a")
            profiler.log_event("failed")
            raise
    assert any("cannot write" in str(w.message) and "memory_events.json" in str(w.message) for w in said)
    with pytest.raises(OutputError, match="cannot write"), MemoryProfiler("x", tmp_path / "b"):
        shutil.rmtree(tmp_path / "b")


def test_the_program_s_exception_passes_when_the_meter_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object) -> None:
        raise RuntimeError("device-side assert triggered")

    with (  # noqa: PT012, PT031
        pytest.warns(UserWarning, match="device-side assert"),
        pytest.raises(Mine),
        MemoryProfiler("x", tmp_path) as profiler,
        profiler.stage("outer"),
        profiler.stage("inner"),
    ):
        monkeypatch.setattr(profiler.memory_tracker.meter, "synchronize", dead)
        raise Mine
    assert [span.name for span in profiler.stages] == ["outer"]


@pytest.mark.parametrize("metadata", [5, "text", [1], None, {"n": 1}, {3: 4}])
def test_a_stage_takes_any_metadata_and_its_program_s_exception_passes(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(Mine), MemoryProfiler("x", tmp_path) as profiler, profiler.stage("s", metadata):
        raise Mine
    (event,) = json.loads((tmp_path / "memory_events.json").read_text())
    assert {"start_bytes", "activation_bytes"} < set(event["metadata"]) or metadata is None


# --- torch.profiler as a guest ----------------------------------------------------------------------------------------


def test_a_trace_that_cannot_start_is_a_warning_and_leaves_nothing_on(tmp_path: Path) -> None:
    stack = _get_current_dispatch_mode_stack()
    profiler = MemoryProfiler("x", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.profiler.profile, "start", lambda self: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.warns(UserWarning, match="no trace: broken"):
            profiler.start_profiling()
    profiler.log_event("goes on")
    profiler.stop_profiling()
    assert _get_current_dispatch_mode_stack() == stack
    assert names(tmp_path) == ["goes on"]


def test_beside_the_program_s_own_torch_profiler_there_is_a_warning_and_the_program_s_events_stay(
    tmp_path: Path,
) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
        profiler = MemoryProfiler("x", tmp_path)
        with pytest.warns(UserWarning, match="no trace: torch.profiler is already in use"):
            profiler.start_profiling()
        for _ in range(6):
            torch.ones(3).exp()
            profiler.step()
        profiler.stop_profiling()
        torch.ones(3).tan()
    assert {"aten::exp", "aten::tan"} <= {event.name for event in own.events()}
    assert "ProfilerStep*" not in {event.name for event in own.events()}
    assert not list(tmp_path.glob("*.pt.trace.json"))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_program_s_own_torch_profiler_may_come_and_go_while_this_one_waits_warms_up_or_records(
    steps: int, tmp_path: Path
) -> None:
    """Two of them stopped one after the other are a segmentation fault."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with MemoryProfiler("x", tmp_path) as profiler:
            for _ in range(steps):
                profiler.step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
                torch.ones(3).exp()
            for _ in range(6):
                profiler.step()
    assert "aten::exp" in {event.name for event in own.events()}
    assert any("another torch.profiler took its place" in str(w.message) for w in said) == (steps > 0)
    assert len(list(tmp_path.glob("*.pt.trace.json"))) == (steps == 0)


def test_of_two_profilers_that_count_steps_the_first_has_the_trace(tmp_path: Path) -> None:
    with MemoryProfiler("a", tmp_path / "a") as first, MemoryProfiler("b", tmp_path / "b") as second:
        first.step()
        with pytest.warns(UserWarning, match="already in use"):
            second.step()
        for _ in range(6):
            first.step()
            second.step()
    assert [len(list((tmp_path / name).glob("*.pt.trace.json"))) for name in "ab"] == [1, 0]


def test_a_program_s_own_profile_function_stays(tmp_path: Path) -> None:
    calls: list[str] = []
    with MemoryProfiler("x", tmp_path) as profiler, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sys.setprofile(lambda frame, event, _: calls.append(event))
        try:
            profiler.step()
            calls.clear()
            len([])
            assert calls
        finally:
            sys.setprofile(None)
    assert any("sys.setprofile" in str(w.message) for w in said)


def test_a_trace_is_stopped_in_the_thread_that_counts_the_steps(tmp_path: Path) -> None:
    profiler = MemoryProfiler("x", tmp_path)
    profiler.start_profiling()
    guest = profiler.profiler
    assert guest is not None
    for _ in range(3):
        profiler.step()
    with pytest.warns(UserWarning, match="by its next step"):
        in_threads(1, lambda _: profiler.stop_profiling())
    assert names(tmp_path) == []
    guest.step()
    assert not torch.autograd._profiler_enabled()
    assert len(list(tmp_path.glob("*.pt.trace.json"))) == 1
    meter = (
        profiler.memory_tracker.meter
    )  # whose mode only this thread can take off: a later test's trace would have it
    assert isinstance(meter, CpuMeter)
    meter.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_ends_the_trace_which_a_child_would_go_on_recording(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        for _ in range(3):
            profiler.step()
        child = os.fork()
        if child == 0:
            os._exit(int(torch.autograd._profiler_enabled()))
        assert os.waitpid(child, 0)[1] == 0
    assert len(list(tmp_path.glob("*.pt.trace.json"))) == 1


def test_a_program_that_ends_while_it_is_traced_ends_as_it_would(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from wanvram import MemoryProfiler\n"
        "p = MemoryProfiler('x', sys.argv[1]); p.start_profiling()\n"
        "for _ in range(3): p.step(); torch.ones(3)\n"
        "sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 7


def test_a_trace_that_cannot_be_written_is_a_warning_and_half_a_file_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: torch.profiler.profile, path: str, **__: Any) -> None:
        Path(path).write_text('{"traceEvents": [{"name": "aten::')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)
    profiler = MemoryProfiler("x", tmp_path)
    profiler.start_profiling()
    for _ in range(4):
        profiler.step()
    with pytest.warns(UserWarning, match="could not write it whole"):
        profiler.step()
    profiler.stop_profiling()
    assert {path.name for path in tmp_path.iterdir()} == {"memory_events.json", "memory_log.json"}


# --- counting on the CPU ----------------------------------------------------------------------------------------------


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@cpu_only
def test_profilers_and_modes_may_be_left_in_any_order(tmp_path: Path) -> None:
    before = _get_current_dispatch_mode_stack()
    first, second, mode = MemoryProfiler("a", tmp_path / "a"), MemoryProfiler("b", tmp_path / "b"), Passing()
    first.start_profiling()
    mode.__enter__()
    second.start_profiling()
    first.stop_profiling()
    assert _get_current_dispatch_mode_stack()[len(before) :] == [mode, second.memory_tracker.meter]
    base = second.allocated_bytes()
    kept = torch.ones(MIB // 4)
    assert second.allocated_bytes() == base + MIB
    second.stop_profiling()
    assert _get_current_dispatch_mode_stack()[len(before) :] == [mode]
    mode.__exit__(None, None, None)
    assert _get_current_dispatch_mode_stack() == before
    del kept


@cpu_only
def test_a_profiler_stopped_in_another_thread_counts_no_longer_and_may_start_again(tmp_path: Path) -> None:
    profiler = MemoryProfiler("x", tmp_path)
    meter = profiler.memory_tracker.meter
    profiler.start_profiling()
    in_threads(1, lambda _: profiler.stop_profiling())
    base = meter.read().allocated_bytes
    kept = torch.ones(MIB // 4)
    assert meter.read().allocated_bytes == base
    profiler.start_profiling()
    assert meter.read().allocated_bytes >= base + MIB
    profiler.stop_profiling()
    assert meter not in _get_current_dispatch_mode_stack()
    del kept


def test_tensors_without_memory_are_not_counted() -> None:
    class Refusing(torch.Tensor):
        @property
        def device(self) -> Any:  # type: ignore[override]
            raise TypeError("no device")

    refusing = torch.ones(3).as_subclass(Refusing)
    meter = CpuMeter(count_existing=True)
    with FakeTensorMode():
        before = torch.empty(2**30)
    with meter:
        base = meter.read().allocated_bytes
        assert base < 2**30
        with FakeTensorMode():
            fake = torch.empty(2**30).add(2).to("meta")
        on_meta = torch.empty(2**30, device="meta") * 2
        assert refusing + 1 is not None
        assert meter.peak().allocated_bytes - base < 1000
    del before, fake, on_meta


def test_compiled_and_higher_order_operations_work_while_tensors_are_counted() -> None:
    with CpuMeter() as meter:
        compiled = torch.compile(lambda x: (x * 2).relu() + 1, backend="eager", fullgraph=True)
        assert compiled(torch.ones(MIB // 4))[0] == 3
        assert torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (torch.ones(3),))[0] == 2
        assert meter.peak().allocated_bytes >= 2 * MIB

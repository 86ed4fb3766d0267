"""The public profiler on ordinary PyTorch code: the specification's events, stages, traces, kills, and lazy imports."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wanvram
from wanvram import MemoryProfiler, MemoryTracker, setup_profiler
from wanvram.analysis.events import read_events
from wanvram.errors import OutputError

MIB = 2**20
EXAMPLE = Path(__file__).parents[2] / "examples" / "profile_your_own_model.py"
cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts CPU tensors; here MemoryProfiler watches the GPU"
)


def events_of(directory: Path) -> list[dict[str, object]]:
    return json.loads((directory / "memory_events.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_the_specification_s_calls_give_the_specification_s_files(tmp_path: Path) -> None:
    profiler = MemoryProfiler("baseline", str(tmp_path / "out"))
    profiler.start_profiling()
    profiler.log_event("vae_load", {"base_memory": profiler.allocated_bytes()})
    profiler.log_event("forward", {"step": 3})
    profiler.log_event("plain")
    profiler.stop_profiling()
    assert profiler.config_name == "baseline"
    assert isinstance(profiler.memory_tracker, MemoryTracker)
    events = events_of(tmp_path / "out")
    assert events == profiler.events
    assert [str(event["memory_log"]).split("=")[0] for event in events] == [
        "vae_load: incremental_memory",
        "forward: peak_memory",
        "plain: peak_memory",
    ]
    assert [event["metadata"] for event in events][1:] == [{"step": 3}, None]
    assert len(json.loads((tmp_path / "out" / "memory_log.json").read_text())) == 4


@cpu_only
def test_base_memory_is_the_increment_and_the_peak_is_the_highest_since_the_start(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        base = profiler.allocated_bytes()
        weights = torch.ones(2 * MIB // 4)
        profiler.log_event("load", {"base_memory": base})
        peak = base + 5 * MIB
        extra = torch.ones(3 * MIB // 4)
        del extra
        profiler.log_event("forward")
        profiler.log_event("again")
    assert [event["memory_log"] for event in profiler.events] == [
        "load: incremental_memory=2.00 MB",
        f"forward: peak_memory={peak / MIB:.2f} MB",
        f"again: peak_memory={peak / MIB:.2f} MB",
    ]
    assert all(event["device_bytes"] > 0 for event in profiler.events)
    del weights


@cpu_only
def test_a_stage_has_its_own_activation_memory_and_the_total_peak_survives_it(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        start = profiler.allocated_bytes()
        big = torch.ones(8 * MIB // 4)
        del big
        with profiler.stage("outer") as outer:
            kept = torch.ones(MIB // 4)
            with profiler.stage("inner", {"n": 1}) as inner:
                temporary = torch.ones(2 * MIB // 4)
                del temporary
        profiler.log_event("total")
    assert (outer.activation_bytes, inner.activation_bytes) == (3 * MIB, 2 * MIB)
    assert profiler.stages == [outer]
    assert outer.children == [inner]
    assert [event["name"] for event in profiler.events] == ["inner", "outer", "total"]
    assert profiler.events[0]["metadata"] == {
        "n": 1, "start_bytes": start + MIB, "activation_bytes": 2 * MIB,
    }  # fmt: skip
    assert profiler.events[2]["allocated_bytes"] == start + 8 * MIB
    del kept


@cpu_only
def test_a_stage_that_fails_is_logged_and_the_next_one_is_not_its_child(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        with pytest.raises(ZeroDivisionError), profiler.stage("fails"):
            raise ZeroDivisionError
        with profiler.stage("works"):
            pass
    assert [span.name for span in profiler.stages] == ["fails", "works"]
    assert [event["name"] for event in events_of(tmp_path)] == ["fails", "works"]


def test_the_files_are_complete_when_the_profiled_code_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), MemoryProfiler("x", tmp_path) as profiler:  # noqa: PT012
        profiler.log_event("before")
        raise ZeroDivisionError
    assert [event["name"] for event in events_of(tmp_path)] == ["before"]
    assert (tmp_path / "memory_log.json").exists()


def test_events_before_the_start_and_after_the_stop_are_logged_too(tmp_path: Path) -> None:
    profiler = MemoryProfiler("x", tmp_path)
    profiler.stop_profiling()
    profiler.log_event("early")
    profiler.start_profiling()
    profiler.start_profiling()
    profiler.stop_profiling()
    profiler.log_event("late")
    profiler.save_events()
    assert [event["name"] for event in events_of(tmp_path)] == ["early", "late"]


def test_a_killed_program_leaves_every_event_it_had_logged(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch; from wanvram import MemoryProfiler\n"
        "p = MemoryProfiler('x', sys.argv[1]); p.start_profiling(); x = torch.ones(10)\n"
        "p.log_event('one'); p.log_event('two', {'base_memory': 0}); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [event["name"] for event in events_of(tmp_path)] == ["one", "two"]


def test_without_trace_torch_profiler_is_left_out(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path, trace=False) as profiler:
        assert profiler.profiler is None
        profiler.step()
    assert {path.name for path in tmp_path.iterdir()} == {"memory_events.json", "memory_log.json"}


def test_torch_profiler_is_started_and_records_nothing_until_step_is_called(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        assert isinstance(profiler.profiler, torch.profiler.profile)
        assert not torch.autograd._profiler_enabled()
        profiler.step()
        assert torch.autograd._profiler_enabled()
    assert {path.name for path in tmp_path.iterdir()} == {"memory_events.json", "memory_log.json"}
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("own", [True, False])
def test_a_trace_records_three_steps_after_two_for_tensorboard_and_then_no_more(tmp_path: Path, own: bool) -> None:
    """Stepped as the specification's class must be, through its `profiler`, and with the method that ours has beside it."""
    with MemoryProfiler("x", tmp_path) as profiler:
        assert profiler.profiler is not None
        step = profiler.step if own else profiler.profiler.step
        for _ in range(12):
            torch.ones(4) @ torch.ones(4)
            step()
    (trace,) = tmp_path.glob("*.pt.trace.json")
    steps = {
        event["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if "ProfilerStep" in event.get("name", "")
    }
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}


@cpu_only
def test_the_trace_changes_no_figure_of_memory_on_the_cpu(tmp_path: Path) -> None:
    figures = []
    for trace in (True, False):
        with MemoryProfiler("x", tmp_path / str(trace), trace=trace) as profiler:
            base = profiler.allocated_bytes()
            for _ in range(6):
                with profiler.stage("step"):
                    torch.ones(MIB // 4) * 2
                profiler.step()
            profiler.log_event("end", {"base_memory": base})
        figures.append([(e["memory_log"], (e["metadata"] or {}).get("activation_bytes")) for e in profiler.events[-1:]])
        figures[-1] += [e["metadata"]["activation_bytes"] for e in profiler.events[:-1]]
    assert figures[0] == figures[1]


def test_events_that_are_logged_after_torch_profiler_took_its_buffers_say_so(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        profiler.log_event("before")
        profiler.step()
        profiler.log_event("while")
    profiler.log_event("after")
    assert [event.get("traced") for event in events_of(tmp_path)] == [None, True, True]
    notes = read_events(tmp_path / "memory_events.json").notes
    assert notes == ("of 2 events the device memory holds torch.profiler's own buffers, too",)


def test_setup_profiler_records_shapes_memory_and_stacks(tmp_path: Path) -> None:
    profiler = setup_profiler(str(tmp_path))
    assert (profiler.record_shapes, profiler.profile_memory, profiler.with_stack) == (True, True, True)


def test_an_output_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        MemoryProfiler("x", tmp_path / "file" / "out")


def test_importing_wanvram_loads_no_torch() -> None:
    code = "import sys, wanvram, wanvram.config, wanvram.record; wanvram.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(wanvram, "nothing_like_this")
    assert all(hasattr(wanvram, name) for name in wanvram.__all__)


def test_the_example_runs_and_says_what_each_part_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["example", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "model_load: incremental_memory=8.0" in out
    assert "forward: 72.0 MiB of activations" in out or torch.cuda.is_available()
    assert [event["name"] for event in events_of(tmp_path)] == ["model_load", "forward", "total"]


def test_the_example_runs_as_its_docstring_says_and_without_a_folder_writes_a_temporary_one(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    given = tmp_path / "given"
    for arguments in ([], [str(given)]):
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        events, log = (Path(path) for path in done.stdout.splitlines()[-1].removeprefix("written: ").split(", "))
        assert (events.name, log.name) == ("memory_events.json", "memory_log.json")
        assert events.parent == given if arguments else events.is_relative_to(tmp_path / "tmp")
        assert len(json.loads(events.read_text())) == 3
        assert json.loads(log.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "given"}


def test_setup_profiler_waits_one_step_warms_up_one_and_writes_a_trace_after_three_more(tmp_path: Path) -> None:
    profiler = setup_profiler(str(tmp_path))
    assert isinstance(profiler, torch.profiler.profile)
    written = []
    with profiler:
        for _ in range(5):
            torch.ones(4) @ torch.ones(4)
            profiler.step()
            written.append(len(list(tmp_path.glob("*.pt.trace.json"))))
    assert written == [0, 0, 0, 0, 1]


@pytest.mark.gpu
def test_on_cuda_the_peak_is_pytorch_s_own(tmp_path: Path) -> None:
    with MemoryProfiler("x", tmp_path) as profiler:
        x = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        del x
        profiler.log_event("forward")
        assert profiler.events[0]["allocated_bytes"] == torch.cuda.max_memory_allocated()

"""Runs that end early, or whose reader does: each leaves its record, and nothing else behind."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from wanvram.cli.main import main
from wanvram.engine.pipeline import Pipeline
from wanvram.errors import InputError
from wanvram.folder_lock import alone_in
from wanvram.record import Failure, RunRecord
from wanvram.recorder.event_file import ListFile
from wanvram.recorder.meters import CpuMeter
from wanvram.recorder.recorder import Recorder
from wanvram.run import execute

BASELINE = Path(__file__).parents[1] / "configs" / "baseline.yaml"
PROFILE = [sys.executable, "-m", "wanvram", "profile"]
SIMULATED = [str(BASELINE), "--device", "simulated", "--weights", "tiny"]


class DeadMeter(CpuMeter):
    """Of a device that has gone, when `dead`."""

    dead = False

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError("CUDA error: unspecified launch failure")


def failure_of(directory: Path) -> dict[str, object] | None:
    failure: dict[str, object] | None = json.loads((directory / "record.json").read_text())["failure"]
    return failure


@pytest.mark.parametrize("live", [[], ["--live"]])
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
def test_a_run_whose_progress_nobody_reads_goes_on_to_its_record(live: list[str], where: str, tmp_path: Path) -> None:
    command = f'set -o pipefail; "$@" {where}'
    flags = [*SIMULATED, *live, "-o", str(tmp_path / "run")]
    ended = subprocess.run(["bash", "-c", command, "bash", *PROFILE, *flags], capture_output=True, timeout=120)
    assert ended.returncode == 0
    assert failure_of(tmp_path / "run") is None
    assert json.loads((tmp_path / "run" / "memory_events.json").read_text())


def test_a_series_whose_progress_nobody_reads_is_run(tmp_path: Path) -> None:
    flags = [*SIMULATED, "--timeout", "100", "-o", str(tmp_path / "run")]
    ended = subprocess.run(
        ["bash", "-c", '"$@" 2>/dev/full', "bash", *PROFILE, *flags], capture_output=True, timeout=120
    )
    assert ended.returncode == 0
    assert failure_of(tmp_path / "run") is None


GENERATE = [
    sys.executable,
    "-m",
    "wanvram",
    "generate",
    "--weights",
    "tiny",
    "--frame_num",
    "81",
    "--sample_steps",
    "50",
]
LONG = """
name: long
model_config: {precision: fp32, device: cpu}
request: {task: t2v-1.3B, size: 832*480, frame_num: 81, sample_steps: 50}
"""


def started(command: list[str], events: Path, scratch: Path) -> subprocess.Popen[bytes]:
    """After its first stage has begun. A background job of a script ignores SIGINT and nohup SIGHUP: here they are as usual."""
    scratch.mkdir()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(scratch)},
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (events.exists() and events.read_text().count('"name"') >= 3):
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_leaves_a_record_that_names_the_signal(sent: signal.Signals, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = started([*GENERATE, "-o", str(directory)], directory / "memory_events.json", tmp_path / "scratch")
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in said
    failure = failure_of(directory)
    assert failure is not None
    assert (failure["kind"], failure["message"]) == ("interrupted", f"ended by {sent.name}")
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("during", "code", "kind"), [("_write_circumstances", 1, "interrupted"), ("_record", 0, None), ("_fits", 0, None)]
)
def test_a_signal_beside_the_run_itself_leaves_a_record_as_well(
    during: str, code: int, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it the run ends at its first stage; after it, it was made: a record that says so, and exit code 0."""
    usual = getattr(execute, during)

    def with_a_signal(*given: object, **named: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return usual(*given, **named)

    monkeypatch.setattr(execute, during, with_a_signal)
    assert main(["generate", "--weights", "tiny", "--sample_steps", "1", "-o", str(tmp_path / "run")]) == code
    failure = failure_of(tmp_path / "run")
    assert (failure and failure["kind"]) == kind


def test_ctrl_c_while_the_flags_are_read_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the command as it is installed, whose imports are over by then."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupted)
    assert main(["check"]) == 1
    assert capsys.readouterr().err == "wanvram: interrupted by the user\n"


def test_ctrl_c_while_the_command_is_imported_shows_no_traceback() -> None:
    """Sent by a module of wanvram's own imports, as the one that came at 0.118 s of a run on an H200's machine."""
    code = (
        "import os, runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class AtImport:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'wanvram.errors': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, AtImport()); runpy.run_module('wanvram', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def test_a_series_that_is_ended_leaves_the_record_of_the_running_one_and_no_child(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    (tmp_path / "long.yaml").write_text(LONG)
    command = [*PROFILE, str(tmp_path / "long.yaml"), "--weights", "tiny", "--timeout", "300", "-o", str(directory)]
    process = started(command, directory / "memory_events.json", tmp_path / "scratch")
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"wanvram: ended by SIGTERM; what was recorded is kept" in said
    failure = failure_of(directory)
    assert failure is not None
    assert (failure["kind"], failure["message"]) == ("interrupted", "ended by SIGTERM")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not any(child.is_running() for child in children)


ERRORS = [
    (
        RuntimeError("CUDA error: an illegal access\nCUDA kernel errors might be"),
        "PyTorch, which says: CUDA error: an illegal access",
    ),
    (OSError(errno.EIO, "Input/output error", "/mnt/disk"), "'/mnt/disk': Input/output error (--debug shows where)"),
    (MemoryError(), "this machine has not enough free memory for that"),
    (AttributeError("'NoneType' object has no attribute 'x'"), "a defect of wanvram; --debug shows where"),
]


@pytest.mark.parametrize(("error", "sentence"), ERRORS)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_whatever_ends_a_run_is_recorded_in_one_sentence(
    error: Exception,
    sentence: str,
    debug: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(self: Pipeline, *_: object) -> None:
        with self.recorder.span("denoise", kind="stage", component="dit"):
            raise error

    monkeypatch.setattr(Pipeline, "denoise_all", broken)
    assert main(["profile", *SIMULATED, *debug, "-o", str(tmp_path / "run")]) == 1
    failure = failure_of(tmp_path / "run")
    assert failure is not None
    assert (failure["kind"], failure["stage"]) == ("error", "denoise")
    assert sentence in str(failure["message"])
    assert ("Traceback" in capsys.readouterr().err) == bool(debug)
    assert "NoneType" not in str(failure["message"])


def test_a_disk_that_takes_no_more_events_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ListFile, "append", full)
    assert main(["profile", *SIMULATED, "-o", str(tmp_path / "run")]) == 1
    failure = failure_of(tmp_path / "run")
    assert failure is not None
    assert str(failure["message"]).endswith("memory_events.json: No space left on device")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["stages"], "what was recorded before is kept"


def test_events_that_cannot_be_written_at_the_end_are_a_failure_with_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(ListFile, "close", full)
    assert main(["profile", *SIMULATED, "-o", str(tmp_path / "run")]) == 1
    failure = failure_of(tmp_path / "run")
    assert failure is not None
    assert str(failure["message"]).endswith("memory_events.json: Disk quota exceeded")


def test_a_device_that_fails_at_every_call_leaves_the_spans_that_were_open() -> None:
    recorder = Recorder(DeadMeter(), None, None)
    outer = recorder.span("denoise", kind="stage", component="dit")
    outer.__enter__()
    recorder.span("step 1", kind="step").__enter__()
    DeadMeter.dead = True
    try:
        failure = recorder.finish_open(Failure("error", "gone"))
    finally:
        DeadMeter.dead = False
    assert (failure.stage, failure.component) == ("denoise", "dit")
    assert [(s.name, [c.name for c in s.children]) for s in recorder.spans] == [("denoise", ["step 1"])]


def test_one_run_at_a_time_writes_to_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    command = ["profile", *SIMULATED, "-o", str(directory)]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    capsys.readouterr()
    with alone_in(directory):
        assert main([*command, "--force"]) == 2
    assert f"another wanvram is writing to {directory}; wait for it or give -o DIR" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert main([*command, "--force"]) == 0


def test_a_series_leaves_the_directory_of_a_running_one_alone(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "run.log").write_text("somebody's")
    with alone_in(directory):
        assert main(["profile", *SIMULATED, "--timeout", "100", "-o", str(directory)]) == 1
    assert [(path.name, path.read_text()) for path in directory.iterdir()] == [("run.log", "somebody's")]


def test_a_run_holds_its_directory_until_its_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = RunRecord.write
    refused = []

    def write(self: RunRecord, path: Path) -> None:
        with pytest.raises(InputError, match="another wanvram is writing"), alone_in(path.parent):
            pass
        refused.append(path.name)
        written(self, path)

    monkeypatch.setattr(RunRecord, "write", write)
    assert main(["profile", *SIMULATED, "-o", str(tmp_path / "run")]) == 0
    assert refused == ["record.json"]


def test_a_pipe_in_place_of_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with alone_in(tmp_path / "pipe"):
        """Whoever writes there then says that it is no folder."""


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert main(["profile", *SIMULATED, "-o", str(tmp_path / "run")]) == 0

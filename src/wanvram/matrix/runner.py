"""Runs many configurations one after the other, each in a fresh process, into directories that say what is already done.

A process of its own means that no run sees another's allocator, library workspaces or peak. Whatever happens to it ends as a
record: out of memory, a crash, a time-out. If this process is killed the running one dies with it, and the next
`run_all` does what is missing.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from wanvram.config import RunConfig
from wanvram.errors import InputError, OutputError
from wanvram.folder_lock import alone_in
from wanvram.matrix.jobs import Job, exit_code, expected, finished, written_record
from wanvram.output_files import writing
from wanvram.record import Failure, RunRecord, write_atomically
from wanvram.recorder.interrupts import INTERRUPTED, Interrupted

__all__ = ["LOG", "Display", "Outcome", "die_with_parent", "run_all"]

LOG = "run.log"  # what the run printed, in its directory
POLL_SECONDS = 0.2
GRACE_SECONDS = 15.0  # from the interrupt to the kill: a step of the 14B model at 720p takes about 10 s on an H200
_PR_SET_PDEATHSIG = 1
_CLOCK = re.compile(r"^\[ *[0-9.]+ s\] ")  # each process counts from its own start


@dataclass(frozen=True)
class Outcome:
    """seconds: of the whole process, None for a result that was there already."""

    job: Job
    record: RunRecord
    seconds: float | None

    @property
    def exit_code(self) -> int:
        return exit_code(self.record)


class Display(Protocol):
    """Hears how far a series of runs is."""

    def started(self, number: int, count: int, name: str) -> None: ...

    def message(self, name: str, text: str) -> None: ...

    def finished(self, number: int, count: int, outcome: Outcome) -> None: ...


def run_all(jobs: Sequence[Job], display: Display, *, timeout: float | None = None, **again: bool) -> list[Outcome]:
    """One outcome per job, in order. timeout: seconds per run. again: what `finished` takes, which says what is not run again.

    Raises InputError, before anything runs, for a directory that holds something else; OutputError; KeyboardInterrupt
    after the running process has recorded what it had.
    """
    known = _known(jobs, again)
    outcomes = []
    with _only_one_in({job.directory.parent for job in jobs}):
        for number, (job, record) in enumerate(zip(jobs, known, strict=True), 1):
            if record is not None:
                outcome = Outcome(job, record, None)
            else:
                display.started(number, len(jobs), job.name)
                outcome = _run(job, timeout, lambda text, job=job: display.message(job.name, text))  # type: ignore[misc]
            display.finished(number, len(jobs), outcome)
            outcomes.append(outcome)
    return outcomes


def _known(jobs: Sequence[Job], again: Mapping[str, bool]) -> list[RunRecord | None]:
    """What `finished` says of each. All directories in the way are counted, not only the first."""
    known, errors = [], []
    for job in jobs:
        try:
            known.append(finished(job, **again))
        except InputError as error:
            errors.append(str(error))
    if errors:
        more = f" ({len(errors) - 1} more are in the way)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}; nothing was run")
    return known


@contextmanager
def _only_one_in(folders: set[Path]) -> Iterator[None]:
    """Two series in one folder would take each other's directories, and two runs on one card each other's memory."""
    with ExitStack() as locks:
        for folder in sorted(folders):
            with writing(f"to {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(alone_in(folder, "wanvram profile"))
        yield


def _run(job: Job, timeout: float | None, tell: Callable[[str], None]) -> Outcome:
    start = time.monotonic()
    log = job.directory / LOG
    try:
        with writing(f"to {job.directory}"):
            job.directory.mkdir(parents=True, exist_ok=True)
            with alone_in(job.directory):
                for name in ("record.json", "config.yaml"):  # of an earlier run: what is there next is this run's
                    (job.directory / name).unlink(missing_ok=True)
                log.write_bytes(b"")
    except InputError as error:  # somebody's single run: nothing of it is touched
        record = replace(_empty_record(job.config), failure=Failure("error", str(error)), notes=[])
        return Outcome(job, record, time.monotonic() - start)
    with tempfile.TemporaryDirectory(prefix="wanvram-") as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(job.config.to_yaml(), encoding="utf-8")
        with log.open("ab") as file:
            process = subprocess.Popen(
                _command(job, path),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},  # the log is read as UTF-8
                **_apart(),
            )
        try:
            timed_out = _watch(process, log, timeout, tell)
        except KeyboardInterrupt as error:
            _note_interrupted(job, str(error) or INTERRUPTED)
            raise
    seconds = time.monotonic() - start
    return Outcome(job, _result(job, process.returncode, timeout if timed_out else None, log), seconds)


def _command(job: Job, path: Path) -> list[str]:
    command = [sys.executable, "-m", "wanvram", "profile", str(path), "-o", str(job.directory), "--force"]
    command += ["--child_of", str(os.getpid())]
    for flag, value in (("--vram_budget", job.vram_budget), ("--ram", job.ram)):
        command += [flag, value] if value is not None else []
    return command


def _watch(process: subprocess.Popen[bytes], log: Path, timeout: float | None, tell: Callable[[str], None]) -> bool:
    """Until the process ends, passing on what it prints; True if it had to be stopped for the time it took."""
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with log.open("rb") as printed:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                for line in printed.read().decode("utf-8", "replace").splitlines():
                    tell(_CLOCK.sub("", line))
                if process.returncode is not None:
                    return False
                if deadline is not None and time.monotonic() >= deadline:
                    _stop(process)
                    return True
    except Interrupted as error:
        _stop(process, error.number)
        raise
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes], number: int = signal.SIGINT) -> None:
    """An interrupt, on which a run records what it has; then a kill. number: the signal that ends the series."""
    if process.poll() is not None:
        return
    if sys.platform == "win32":  # it sends another group Ctrl-Break only; the child takes it for Ctrl-C
        number = signal.CTRL_BREAK_EVENT
    process.send_signal(number)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _interruptible() -> None:
    """In the child: a series started in the background of a script ignores SIGINT, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _apart() -> dict[str, Any]:
    """Ctrl-C comes to this process alone, which passes it on once: the child is in no group of ours."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True, "preexec_fn": _interruptible}


def _result(job: Job, code: int, timeout: float | None, log: Path) -> RunRecord:
    """The record the run wrote, or one that says why it wrote none."""
    written = written_record(job.directory)
    if written is not None and (timeout is None or written.failure is None):
        return written
    if timeout is not None:
        failure = Failure("error", f"it was stopped after {timeout:g} s (--timeout)")
        if written is not None and written.failure is not None:
            failure = replace(written.failure, kind="error", message=failure.message)
    else:
        # 3: the planner found nothing that fits, which is an answer like running out of memory.
        failure = Failure("oom" if code == 3 else "error", _reason(code, log))
    return _written_for(job, failure, written)


def _note_interrupted(job: Job, reason: str) -> None:
    """In the place of a run that was stopped before it could record anything."""
    with suppress(OSError, OutputError):  # the interrupt is what the user hears of
        if not (job.directory / "record.json").is_file():
            _written_for(job, Failure("interrupted", reason), None)


def _written_for(job: Job, failure: Failure, written: RunRecord | None) -> RunRecord:
    """The record of a run that failed, with the configuration it belongs to."""
    config = expected(job, job.config)
    record = written or _empty_record(config)
    record.failure = failure
    record.fits = False if failure.kind == "oom" else record.fits
    if not (job.directory / "config.yaml").is_file():
        write_atomically(job.directory / "config.yaml", config.to_yaml())
    record.write(job.directory / "record.json")
    return record


def _reason(code: int, log: Path) -> str:
    printed = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in printed if line.strip() and not line.startswith("  ")]  # not commands to copy
    last = lines[-1].removeprefix("wanvram: ")[:500] if lines else "it printed nothing"
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the host may have run out of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}; last it said: {last}"
    return last


def _empty_record(config: RunConfig) -> RunRecord:
    """Of a run that left none."""
    return RunRecord(
        device=config.device,
        simulated=config.device == "simulated",
        config=config.to_dict(),
        budget_bytes=config.memory_limit_bytes,
        notes=[f"the run left no record; what it printed is in {LOG}"],
    )


def die_with_parent(parent: int) -> None:
    """For the process of one run: ends when process `parent` does, even by kill -9, on Linux. On Windows Ctrl-Break interrupts."""
    if sys.platform == "win32":
        signal.signal(signal.SIGBREAK, signal.default_int_handler)
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)

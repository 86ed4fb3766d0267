"""What an answer may be, and the limits of time and memory within which it is given."""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wanvram.cli.main import main
from wanvram.errors import WanvramError

__all__ = ["CPU_SECONDS", "MEMORY", "ReachedError", "Trial", "Used", "command", "judged", "limit_memory", "sentence"]

CPU_SECONDS = 10
WALL_SECONDS = 90  # of what waits and computes nothing, such as a pipe
MEMORY = 1 << 30
CODES = (0, 1, 2, 3)
PYTHON = re.compile(
    r"Traceback \(most"
    r"|\b[A-Z]\w*(Error|Exception|Warning)\b|NoneType|unhashable|\b(dict|tuple|bytes|str|int|float)'? object|codec can't"
    r"|\b(BadZipFile|BadGzipFile|IncompleteRead|BadStatusLine|RemoteDisconnected|LineTooLong|InvalidURL|UnknownProtocol"
    r"|UnknownTransferEncoding|StopIteration|KeyboardInterrupt|SystemExit|GeneratorExit|gaierror)\b"
    r"|<[\w.]+ object|<class '|\bat 0x[0-9a-f]{6}|\b(Posix)?Path\('|\bb'\\x"
    r"|\bobject of type\b|does not foresee|subscriptable|not iterable|unexpected keyword|positional argument|required argument"
    r"|not enough free memory|stopped by PyTorch|embedded null"
)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Trial = tuple[str, Callable[[], list[str]]]  # what is done, and what is wrong with the answer


class ReachedError(BaseException):
    """Raised in place of work that takes its time for good reasons: everything before it has been passed."""


class _HangError(BaseException):
    pass


def _hang(number: int, _frame: object) -> None:
    raise _HangError(f"over {CPU_SECONDS} s of CPU" if number == signal.SIGPROF else f"over {WALL_SECONDS} s")


def limit_memory() -> None:
    """From now on the process may have MEMORY more data than it has; maps of files do not count."""
    signal.signal(signal.SIGPROF, _hang)
    signal.signal(signal.SIGALRM, _hang)
    held = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass
class Used:
    """By one input: CPU seconds, also of processes it started, and bytes of resident memory at the peak, more than before."""

    cpu_seconds: float = 0.0
    memory_bytes: int = 0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        cpu, held = _cpu(), _status("VmRSS")
        yield
        self.cpu_seconds = _cpu() - cpu
        self.memory_bytes = max(0, _status("VmHWM") - held)


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def judged(trials: list[Trial]) -> list[str]:
    """Everything that is wrong, `what was done: what is wrong` each."""
    found = []
    for label, trial in trials:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        try:
            wrong = trial()
        except _HangError as error:
            wrong = [f"{error} at {traceback.format_exc().splitlines()[-6:-1]}"]
        except BaseException:
            wrong = [traceback.format_exc()[-1500:]]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        found += [f"{label}: {what}" for what in wrong]
    return found


def command(arguments: list[str], codes: tuple[int, ...] = CODES) -> Trial:
    """A command line, run in this process."""
    return ascii(" ".join(arguments))[:300], lambda: _answer(arguments, codes)


def sentence(label: str, call: Callable[[], object]) -> Trial:
    """A call that may raise WanvramError with a sentence, and nothing else."""

    def trial() -> list[str]:
        try:
            call()
        except WanvramError as error:
            said = str(error)
            found = ["words of Python"] if PYTHON.search(said) else []
            found += [] if 5 < len(said) < 5000 else [f"a sentence of {len(said)} characters"]
            return [f"{what}: {said[:300]}" for what in found]
        return []

    return label, trial


def _said(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main(arguments)
        except SystemExit as error:
            code = error.code or 0
        except ReachedError:
            code = 0
        out.flush()
        err.flush()
    number = code if isinstance(code, int) else -1
    return number, *(stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]


def _answer(arguments: list[str], codes: tuple[int, ...]) -> list[str]:
    code, out, err = _said(arguments)
    is_json = "--json" in arguments
    found = []
    if code not in codes:
        found.append(f"exit code {code}")
    if PYTHON.search(err) or (not is_json and PYTHON.search(out)):
        found.append("words of Python")
    if CONTROLS.search(err) or (not is_json and CONTROLS.search(out)):
        found.append("a control character")
    if is_json and code == 0 and out:
        json.loads(out)
    if code == 2 and not 20 < len(err) < 1200:
        found.append(f"a sentence of {len(err)} characters")
    return [f"{what}: {err[:300] or out[:200]}" for what in found]

"""A Python script as if it had been started by `python script.py args...`, on the simulated card."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from wanvram.errors import require
from wanvram.foreign.cuda_api import patched
from wanvram.foreign.errors import SimulatedOutOfMemory, Unsupported
from wanvram.foreign.session import SimulatedRun

__all__ = ["check_script", "run_script"]


def check_script(path: Path) -> None:
    """Raises InputError for a file that is not there."""
    require(path.is_file(), f"{path} is no file")


def run_script(
    path: Path,
    arguments: Sequence[str],
    run: SimulatedRun | None = None,
    *,
    inside: AbstractContextManager[Any] | None = None,
    verb: str = "simulate",
) -> int:
    """The script's exit status: 0, what it exited with, 1 after an exception, whose traceback goes to stderr as Python's does.

    `run.fits` is False after it where a full card ended the script. inside: entered around the script. verb: of wanvram, who runs it.
    Raises InputError for a file that is not there, and Unsupported for what cannot be simulated.
    """
    check_script(path)
    with _as_main(path, arguments), no_child_processes(verb):
        try:
            with inside or nullcontext():
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exit_:
            status = _status(exit_.code)
            if run is not None and status:
                run.fail(f"it ended with status {status}")
            return status
        except SimulatedOutOfMemory as error:
            if run is not None:
                run.refuse(error)
            return 1
        except Unsupported:
            raise
        except Exception as error:
            full = _full(error)
            if run is not None:
                run.refuse(full) if full else run.fail(f"{type(error).__name__}: {error}")
            traceback.print_exception(type(error), error, _below(error))
            return 1
    return 0


def _full(error: BaseException | None) -> SimulatedOutOfMemory | None:
    """The full card behind an exception that the script made of it."""
    while error is not None and not isinstance(error, SimulatedOutOfMemory):
        error = error.__cause__ or error.__context__
    return error


def _status(code: Any) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _below(error: BaseException) -> Any:
    """The traceback without runpy and this file."""
    step = error.__traceback__
    while step is not None and step.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        step = step.tb_next
    return step


@contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """sys.argv and sys.path as Python sets them for a script, and as they were afterwards."""
    argv, found = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, found


@contextmanager
def no_child_processes(verb: str) -> Iterator[None]:
    """Another Python would run without the simulated card, or unwatched, and say nothing of it: refused by name."""
    plain = subprocess.Popen.__init__

    def start(process: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        first = args if isinstance(args, (str, bytes)) else next(iter(args), "")
        name = os.path.basename(os.fsdecode(first).split(" ")[0])
        if name.startswith(("python", "torchrun", "accelerate")):
            missing = "simulated" if verb == "simulate" else "watched"
            raise Unsupported(f"the child process {name} is not {missing}: give its script to `wanvram {verb}` itself")
        plain(process, args, *rest, **kwargs)

    with patched([(subprocess.Popen, "__init__", start)]):
        yield

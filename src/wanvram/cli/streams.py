"""stdout and stderr as they are found: of any encoding, full, closed, or with nobody reading. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from wanvram.command_line import MAX_COMMAND
from wanvram.foreign_text import ESCAPING, shown

__all__ = ["abandon", "flushed", "prepare", "say", "settle_stderr"]


def prepare() -> None:
    """What the encoding of a stream does not have is written as JSON escapes it: no text and no document fails on it.

    A stream that was closed at the start gets its number back, which a file of the run would have got; stderr takes text again, for
    `print(file=None)` would write on stdout.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError, ValueError):  # a detached or closed stream shows nothing in any encoding
                stream.reconfigure(errors=ESCAPING)


def say(sentence: object, commands: Sequence[str] = ()) -> None:
    """One sentence on stderr, if it can be written there at all, and commands below it. Foreign text cannot leave its line."""
    try:
        lines = [f"wanvram: {shown(sentence)}", *(f"  {shown(command, MAX_COMMAND)}" for command in commands)]
        print("\n".join(lines), file=sys.stderr, flush=True)
    except (AttributeError, OSError, ValueError):
        abandon(sys.stderr)


def flushed() -> bool:
    """Whether everything on stdout got out; says why not, unless its reader has gone."""
    if sys.stdout is None:
        return True
    try:
        sys.stdout.flush()
        return True
    except BrokenPipeError:
        pass
    except (OSError, ValueError) as error:
        say(f"what was to be printed could not be written: {getattr(error, 'strerror', None) or 'stdout is closed'}")
    abandon(sys.stdout)
    return False


def settle_stderr() -> None:
    """What could not be shown is no failure of the command, which Python would make of it at the exit (120)."""
    try:
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        abandon(sys.stderr)


def abandon(stream: TextIO | None) -> None:
    """Lets what is still in the stream's buffer go to nowhere: flushed at the exit, it would fail again, with a traceback."""
    with suppress(AttributeError, OSError, ValueError):
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""The one way to show what came from outside: harmless in a terminal, short, and in plain words. No torch.

Outside are files of other people (records, traces, snapshots), names, paths, flags and answers of services.
"""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from typing import Any

from wanvram.errors import WanvramError

__all__ = ["ESCAPING", "MAX_SHOWN", "quoted", "shown", "unforeseen", "why"]

MAX_SHOWN = 500  # characters of one text
MAX_QUOTED = 60  # of a value within a sentence
ESCAPING = "wanvram.escaping"  # an error handler of codecs for streams that cannot show everything


def shown(text: object, limit: int = MAX_SHOWN) -> str:
    r"""The text in one line of at most `limit` characters: line ends and tabs become spaces, other characters that are not
    to be seen (escape codes, controls of direction, lone surrogates) what JSON writes for them, as in `\u001b`.

    What JSON has other values for (null, true, lists, sections) is shown as JSON.
    """
    is_json = text is None or isinstance(text, (bool, list, tuple, dict))
    line = json.dumps(text, ensure_ascii=False, default=str) if is_json else str(text)
    cut = line[:limit]  # before anything is done for each of its characters
    if not cut.isprintable():
        cut = "".join(map(_visible, cut))
    return cut if len(line) <= limit and len(cut) <= limit else f"{cut[: limit - 1]}…"


def _visible(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) == "Zs":  # spaces of other scripts mean something there
        return char
    return " " if char in "\n\r\t\v\f\x85\u2028\u2029" else json.dumps(char)[1:-1].replace("\x7f", "\\u007f")


def quoted(value: Any, limit: int = MAX_QUOTED) -> str:
    """A value of any type within a sentence, in the words of JSON: 'text', 12, true, null, a list of 3, a section of 2."""
    if isinstance(value, str):
        return f"'{shown(value, limit)}'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**40:  # its digits may take seconds, or be refused
        return "a number of over 40 digits"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a section of {len(value)}" if isinstance(value, dict) else "a value of a kind that has no place there"


def why(error: BaseException) -> str:
    """What is wrong with a file, from what its reader raised: a sentence of ours as it is, anything else in words."""
    if isinstance(error, WanvramError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is no UTF-8 text"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half of a character (a lone surrogate)"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON from line {error.lineno}, column {error.colno} on"
    if isinstance(error, KeyError):
        return f"{quoted(error.args[0] if error.args else '')} is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, (OverflowError, ZeroDivisionError)):
        return "a number is too large or too small"
    return "a value is not of the kind that belongs there"


def unforeseen(error: Exception, who: str, debug: str) -> str:
    """What stopped `who`, where nobody expected it, in one sentence. debug: what the user gives to see the place in the code."""
    if isinstance(error, OSError):
        where = f"{quoted(os.fsdecode(error.filename), 200)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{where}{error.strerror or 'the system refused to read or write'} ({debug} shows where)"
    if isinstance(error, MemoryError):
        return "this machine has not enough free memory for that"
    if type(error) is RuntimeError or type(error).__module__.startswith("torch"):
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        if said:
            return f"{who} was stopped by PyTorch, which says: {shown(said, 200)} ({debug} shows where)"
    return f"{who} stopped at something that it does not foresee, a defect of wanvram; {debug} shows where"


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """As JSON escapes it, so that a document stays one in any encoding: two halves for what is beyond U+FFFF."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPING, _escaped)

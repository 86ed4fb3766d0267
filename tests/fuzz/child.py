"""Gives mutated files to the verbs, in a process whose memory and time are limited: `python child.py SOURCES OUT SEED SECONDS`.

Prints one JSON line: how many files were tried, and of the first failures the kept file and what was wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutations import mutated
from wanvram.cli.main import main
from wanvram.config import load_config
from wanvram.errors import WanvramError

CPU_SECONDS = 10
MEMORY = 1 << 30
PYTHON = re.compile(
    r"Traceback \(most"
    r"|\b[A-Z]\w*(Error|Exception|Warning)\b|NoneType|unhashable|\b(dict|tuple|bytes|str|int|float)'? object|<\w+ object|codec can't"
    r"|\bobject of type\b|does not foresee|subscriptable|not iterable|unexpected keyword|positional argument|required argument"
)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class _HangError(BaseException):
    pass


def _hang(*_: object) -> None:
    raise _HangError


def said(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
        out.flush()
        err.flush()
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]


def problems(arguments: list[str]) -> list[str]:
    """What is wrong with the answer to a file."""
    code, out, err = said(arguments)
    found = []
    if code not in (0, 2):
        found.append(f"exit code {code}")
    if PYTHON.search(err) or ("--json" not in arguments and PYTHON.search(out)):
        found.append("words of Python")
    if CONTROLS.search(err) or ("--json" not in arguments and CONTROLS.search(out)):
        found.append("a control character")
    if "--json" in arguments and code == 0:
        json.loads(out)
    if code == 2 and not 20 < len(err) < 1200:
        found.append(f"a sentence of {len(err)} characters")
    return [f"{what}: {err[:300] or out[:200]}" for what in found]


def configured(path: Path) -> list[str]:
    try:
        load_config(path)
    except WanvramError as error:
        return [f"words of Python: {error}"] if PYTHON.search(str(error)) else []
    return []


def commands(kind: str, place: Path) -> list[list[str]]:
    if kind != "run":
        return [["analyze", str(place)], ["analyze", str(place), "--json"]]
    folder = str(place.parent)
    report = ["report", folder, "--format"]
    return [["analyze", folder], ["analyze", folder, "--json"], [*report, "md"], [*report, "text"], ["report", folder, "--json"],
            ["compare", folder, folder], ["compare", folder, "--json"]]  # fmt: skip


def tried(kind: str, place: Path) -> list[str]:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        if kind == "config":
            return configured(place)
        return [f"{' '.join(c[:1] + c[2:])}: {p}" for c in commands(kind, place) for p in problems(c)]
    except _HangError:
        return [f"over {CPU_SECONDS} s of CPU"]
    except BaseException:
        return [traceback.format_exc()[-1500:]]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(sources: Path, out: Path, seed: int, seconds: float) -> dict[str, Any]:
    """sources: one folder for each kind of file (run, file, config)."""
    rng = random.Random(seed)
    files = sorted(path for path in sources.glob("*/*") if path.is_file())
    failures: list[dict[str, str]] = []
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end and len(failures) < 20:
        source = rng.choice(files)
        kind = source.parent.name
        folder = out / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source.parent, folder) if kind == "run" else folder.mkdir(parents=True)
        (folder / source.name).write_bytes(mutated(source.name, source.read_bytes(), rng))
        (out / "last").write_text(f"{seed} {count} {source.name}")
        wrong = tried(kind, folder / source.name)
        count += 1
        if wrong:
            kept = out / f"failure-{len(failures)}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            failures.append({"file": str(kept / source.name), "wrong": " | ".join(wrong)})
    return {"count": count, "failures": failures}


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, _hang)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))

"""Command lines of every verb, made of argparse's own actions: a good one, to which flags with any values are added."""

# ruff: noqa: E501  # tables of odd values
from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.judge import Trial, command
from fuzz.places import ODD_NAMES, write_odd_places
from wanvram.cli.main import build_parser

__all__ = ["try_flags"]

GOOD: dict[str, list[list[str]]] = {
    "generate": [["--weights", "tiny", "--frame_num", "1", "--sample_steps", "1"], ["--ckpt_dir", "official", "--task", "t2v-1.3B"],
                 ["--config", "tiny.yaml"], ["--weights", "random", "--device", "simulated", "--task", "i2v-14B", "--image", "a.png"]],
    "plan": [["--task", "t2v-1.3B", "--size", "480p", "--gpu", "rtx4060"], ["--config", "tiny.yaml", "--vram", "8GiB", "--gpu", "card.yaml"],
             ["--longest", "--size", "480p", "--gpu", "rtx4090"]],
    "estimate": [["--task", "t2v-1.3B", "--size", "832*480"], ["--config", "tiny.yaml"], ["--task", "vace-1.3B", "--src_video", "a.mp4"]],
    "profile": [["tiny.yaml", "--device", "simulated"], ["tiny.yaml"], ["tiny_matrix.yaml"], ["tiny.yaml", "baseline.yaml"]],
    "analyze": [["run"], ["file/trace_BE.json"], ["file/snap_host_traces.pickle"], ["file/memory_events.json"]],
    "compare": [["run", "run"], ["run"], ["run", "--fail-if", "peak.device_bytes > 8GiB"]],
    "report": [["run"], ["run", "--format", "text"], ["run", "--format", "md", "--lang", "zh"]],
    "check": [["--cards"], []],
    "convert": [["official", "--precision", "bf16", "-o", "out"], ["official", "--precision", "fp8", "-o", "out", "--components", "dit"]],
}  # fmt: skip
NUMBERS = ["0", "1", "-1", "4", "5", "81", "2.5", "nan", "inf", "-inf", "1e400", "1e-320", "9" * 30, "-" + "9" * 400, "0x10", "1_0", "٣", "",
           " 5 ", "+5", "1" * 5000, "2147483648", "18446744073709551616", "5.0"]  # fmt: skip
TEXTS = ["", " ", "\n", "\t", "a", "a cat", "名字", "\x1b]0;t\x07", "\udcff", "\u202ea", "\u2028", "'", '"', "%s", "{}", "a,b", ",", ",,", "a=b", "-", "--",
         "-1", "--x", "True", "None", "8GiB", "0GiB", "-8GiB", "8 XB", "1e99GiB", "auto", "AUTO", "832*480", "0*0", "1*99999999", "832*480*3",
         "480p,720p", "480p", "9" * 50 + "*" + "9" * 50, "rtx4090", "h200", "tiny", "random", "peak.device_bytes > 8GiB", "peak > nan", "a > b", "> 5",
         "peak.device_bytes >", "x" * 100_000, "\U0010ffff", "dit", "dit,vae", "dit,,", "no"]  # fmt: skip
FILES = ["run", "run/record.json", "file/trace_BE.json", "file/snap_host_traces.pickle", "file/memory_events.json", "tiny.yaml", "tiny_matrix.yaml",
         "card.yaml", "a.png", "a.jpg", "a.mp4", "official", "diffusers", "out", "out/x.mp4", "out/x.pickle", "tokenizer.json"]  # fmt: skip


def try_flags(rng: random.Random, sources: Path, now: Path) -> list[Trial]:
    """now becomes the current folder: what is written to relative paths stays in it."""
    for source in (
        sources / "run",
        sources / "file",
        *(sources / "checkpoints" / n for n in ("official", "diffusers")),
    ):
        shutil.copytree(source, now / source.name, copy_function=os.link)
    for source in (*(sources / "yaml").iterdir(), *(sources / "card").iterdir(), *(sources / "media").glob("a.*")):
        os.link(source, now / source.name)
    paths = [*write_odd_places(now), *FILES]
    os.chdir(now)
    verb = rng.choice(sorted(GOOD))
    arguments = [*rng.choice(GOOD[verb])]
    for _ in range(rng.randint(0, 4)):
        arguments += _flag(rng.choice(_actions(verb)), paths, rng)
    how = rng.random()
    if how < 0.1:
        rng.shuffle(arguments)
    elif how < 0.2 and arguments:
        del arguments[rng.randrange(len(arguments))]
    elif how < 0.3 and arguments:
        arguments[rng.randrange(len(arguments))] = rng.choice([*paths, *TEXTS, *NUMBERS])
    # No key of the pools names a place outside: this holds for what a shuffle makes of them, too.
    arguments = [a for a in arguments if not a.startswith("/") and ".." not in a and a not in ("--terminate", "-t")]
    return [command([verb, *arguments])]


@cache
def _actions(verb: str) -> Sequence[argparse.Action]:
    verbs = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    verbs.choices[verb].fill()
    return [a for a in verbs.choices[verb]._actions if a.dest not in ("help", "child_of", "debug", "terminate")]


def _flag(action: argparse.Action, paths: Sequence[str], rng: random.Random) -> list[str]:
    value = _value(action, paths, rng)
    if not action.option_strings:
        return [value]
    name = rng.choice(action.option_strings)
    if rng.random() < 0.03:
        name = name[: rng.randint(3, 40)]  # argparse takes what is not ambiguous
    if action.nargs == 0 or rng.random() < 0.04:
        return [name] if rng.random() < 0.95 else [f"{name}={value}"]
    pair = [f"{name}={value}"] if rng.random() < 0.4 else [name, value]
    return pair * 2 if rng.random() < 0.05 else pair


def _value(action: argparse.Action, paths: Sequence[str], rng: random.Random) -> str:
    fitting: Sequence[Any] = TEXTS
    if action.choices:
        fitting = [str(choice) for choice in action.choices]
    elif action.type in (int, float):
        fitting = NUMBERS
    elif action.type is Path or any(word in str(action.metavar) for word in ("FILE", "DIR", "CARD")):
        fitting = paths
    pool = fitting if rng.random() < 0.75 else rng.choice([TEXTS, NUMBERS, paths, ODD_NAMES])
    return str(rng.choice(pool))

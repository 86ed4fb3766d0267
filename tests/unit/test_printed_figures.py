"""A figure on a page is the figure in the file beside it: the last section of docs/evidence.md says which is which, and is checked here."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECTION = "## Where each figure is from\n"
HELD = ("## The smallest card", "## 最小的显卡")  # sections of the READMEs whose rows must all be listed
_FIELD = re.compile(r"\{(\S+?)(?: (MiB|GiB|%|up%|mean))? (\.\d[fe])\}")
_STEP = re.compile(r"\[([^\]]+)\]|\.?([A-Za-z_]\w*)")


@cache
def document(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


@cache
def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def listed() -> list[tuple[str, str, str]]:
    """(file, page, text with fields) of every line of the section."""
    result: list[tuple[str, str, str]] = []
    file, pages = "", []
    for line in page("docs/evidence.md").partition(SECTION)[2].splitlines():
        if head := re.fullmatch(r" {4}(\S+\.json)  ->  (.+)", line):
            file, pages = head[1], head[2].split()
        elif line.startswith(" " * 8):
            result += [(file, name, line.strip()) for name in pages]
    return result


def at(data: Any, path: str) -> Any:
    """`cases[NAME].step_seconds`; a place in a list by number, or by what is called name. Also what is counted: peaks, equal, worst."""
    if path in ("peaks", "equal") or path.startswith("worst."):
        return counted(data, path)
    for inside, key in _STEP.findall(path):
        if not inside:
            data = data[key]
        elif isinstance(data, dict):
            data = data[inside.replace("_", " ")]
        elif inside.isdigit():
            data = data[int(inside)]
        else:
            (data,) = [item for item in data if item["name"] == inside]
    return data


def counted(data: list[dict[str, Any]], what: str) -> float:
    """Of predict_vs_measure.py: stage peaks of allocated and reserved memory, those equal to the byte, the worst error of a quantity."""
    rows = [row for run in data for row in run["rows"]]
    pairs = [row[q] for row in rows for q in ("allocated", "reserved")]
    if what.startswith("worst."):
        return max(abs(row[what[6:]]["error"]) for row in rows)
    return len(pairs) if what == "peaks" else sum(p["predicted"] == p["measured"] for p in pairs)


def printed(value: Any, unit: str, form: str) -> str:
    if unit == "mean":
        value = mean(value)
    elif unit in ("MiB", "GiB"):
        value = value / (2**20 if unit == "MiB" else 2**30)
    elif unit in ("%", "up%"):
        value *= 100
    if unit == "up%":  # a bound: never rounded to less than it is
        digits = int(form[1])
        value = math.ceil(value * 10**digits) / 10**digits
    text = format(float(value), form)
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", text)  # 3.0e-03 -> 3.0e-3


def filled(file: str, text: str) -> str:
    return _FIELD.sub(lambda found: printed(at(document(file), found[1]), found[2] or "", found[3]), text)


@pytest.mark.parametrize(("file", "name", "text"), listed())
def test_a_page_prints_what_is_in_the_file(file: str, name: str, text: str) -> None:
    assert _FIELD.search(text)
    assert filled(file, text) in page(name)


def test_the_section_covers_the_tables() -> None:
    assert len(listed()) > 45
    texts = {name: [filled(file, text) for file, where, text in listed() if where == name] for _, name, _ in listed()}
    for name, head in zip(("README.md", "README.zh-CN.md"), HELD, strict=True):
        section = page(name).partition(head)[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if re.match(r"\| .*\d", line)]
        assert rows
        assert not [row for row in rows if not any(text in row for text in texts[name])]
    measured = page("docs/evidence.md").partition("## The audit")[0]
    tables = [line for line in measured.splitlines() if re.match(r"\| .*\d(?: s| MiB| %|e-\d)", line)]
    assert len(tables) > 25
    assert not [row for row in tables if not any(text in row for text in texts["docs/evidence.md"])]


def test_a_changed_digit_in_the_readme_is_seen() -> None:
    file, name, text = next(row for row in listed() if row[1] == "README.md" and "nvml_peak_bytes" in row[2])
    right = filled(file, text)
    assert right in page(name)
    for place, digit in ((i, c) for i, c in enumerate(right) if c.isdigit() and i > right.index("**")):
        wrong = right[:place] + str((int(digit) + 1) % 10) + right[place + 1 :]
        assert filled(file, text) not in page(name).replace(right, wrong)

"""Figures of docs/strategy.md that no file has, because they are simulated, are what its command says today."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from wanvram.cli.main import main
from wanvram.units import GIB

PAGE = Path(__file__).parents[2] / "docs" / "strategy.md"
COMMAND = "estimate --task t2v-14B --size 1280*720 --precision bf16 --gpu h200 --json"
SHORT = "--size 832*480 --frame_num 5"  # of the second table


def rows() -> list[tuple[str, list[str]]]:
    """Flags of a row, and its other cells."""
    found = re.findall(r"^\| `(--load_strategy [^`]*)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(flags, cells.split(" | ")) for flags, cells in found]


def test_the_page_has_two_tables_and_the_flags_of_the_second() -> None:
    assert {len(cells) for _, cells in rows()} == {4, 2}
    assert f"`{SHORT}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("flags", "cells"), rows())
def test_a_row_is_what_the_command_says(flags: str, cells: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{COMMAND} {flags}" if len(cells) == 4 else f"{COMMAND} {SHORT} {flags}"
    assert main(words.split()) == 0
    said = json.loads(capsys.readouterr().out)
    stages = {stage["name"]: stage for stage in said["stages"]}

    def memory(bytes_of: dict[str, int]) -> str:
        name = "peak_device_bytes" if "name" in bytes_of else "device_bytes"
        return f"{bytes_of[name] / GIB:.2f}"

    denoise, decode, peak = stages["denoise"], stages["decode"], said["peak"]
    expected = [memory(denoise), f"{denoise['seconds'] / 50:.2f} s"]
    if len(cells) == 4:
        expected = [f"{memory(peak)}, {peak['stage']}", *expected, f"{memory(decode)}, {decode['seconds']:.2f} s"]
    assert cells == expected

"""Amounts and times as people write and read them."""

from __future__ import annotations

import pytest

from wanvram.errors import InputError
from wanvram.units import GIB, MIB, human, parse_memory, seconds


@pytest.mark.parametrize(("text", "said"), [("8", "8 what? write 8GiB"), (" 5.5 ", "5.5 what"), ("1048575", "what?")])
def test_a_bare_small_number_is_no_amount_of_memory(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        parse_memory(text)


@pytest.mark.parametrize("text", ["0", "512KiB", "1000 B"])
def test_less_than_a_mebibyte_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InputError, match="is not an amount of memory"):
        parse_memory(text)


def test_bytes_may_be_stated_bare_from_a_mebibyte_on() -> None:
    assert parse_memory("1048576") == MIB
    assert parse_memory("8589934592") == parse_memory("8GB") == 8 * GIB


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.417, "0.42 s"),
        (119.4, "119.4 s"),
        (185, "3 min 05 s"),
        (7082, "118 min 02 s"),
        (7199, "119 min 59 s"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_from_120_minutes_on_there_are_hours(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.0 MiB"),
        (300 * MIB, "300.0 MiB"),
        (8 * GIB, "8.00 GiB"),
        (8 * GIB - MIB, "8,191.0 MiB"),
        (-GIB, "-1.00 GiB"),
        (GIB + GIB // 2, "1.50 GiB"),
        (9 * GIB + GIB // 4, "9.25 GiB"),
        (GIB // 2, "512.0 MiB"),
    ],
)
def test_whole_gibibytes_and_quarters_are_said_as_they_are_typed(count: int, text: str) -> None:
    assert human(count) == text

"""Amounts and times as people write and read them."""

from __future__ import annotations

import pytest

from wanvram.errors import InputError
from wanvram.units import (
    GIB,
    KIB,
    MIB,
    exact,
    gib,
    human,
    mib,
    mib_cell,
    parse_bytes,
    parse_memory,
    seconds,
    seconds_cell,
)


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


@pytest.mark.parametrize("text", ["0.5", "1", "1.0", "0.001"])
def test_the_smallest_bare_number_is_asked_for_its_unit_too(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_memory(f" {text} ")
    assert str(caught.value) == f"{text} what? write {text}GiB"


def test_one_mebibyte_is_the_least_memory_and_two_to_the_63rd_more_than_there_is() -> None:
    assert parse_memory("1MiB") == MIB
    assert parse_bytes("8388607T") == 2**63 - 2**40
    for text in ("8388608T", "9223372036854775808", "1" * 400):
        with pytest.raises(InputError, match=f"'{text[:40]}' is more memory than there is"):
            parse_bytes(text)


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "8 G B", "1.GiB", "8GiB more"])
def test_what_is_no_amount_is_quoted_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_bytes(text)
    assert str(caught.value) == f"'{text}' is not an amount of memory; write for example 8GiB, 8GB or 512MiB"


@pytest.mark.parametrize(
    ("count", "text"),
    [(8 * GIB, "8GiB"), (8028 * MIB, "8028MiB"), (MIB, "1MiB"), (GIB + 1, str(GIB + 1)), (GIB // 2 + 1, "536870913")],
)
def test_an_exact_amount_is_in_the_largest_unit_that_divides_it(count: int, text: str) -> None:
    assert exact(count) == text
    assert parse_memory(text) == count


def test_the_units_are_powers_of_1024() -> None:
    assert (KIB, MIB, GIB) == (1024, 1_048_576, 1_073_741_824)


def test_columns_have_a_dash_where_nothing_is_known() -> None:
    assert [mib_cell(count) for count in (None, 0, 1234 * MIB + MIB // 2)] == ["-", "0.0", "1,234.5"]
    assert [seconds_cell(value) for value in (None, 0.0, 12.34)] == ["-", "0.00 s", "12.3 s"]
    assert (mib(1234 * MIB + MIB // 2), gib(1234 * GIB + GIB // 4)) == ("1,234.5 MiB", "1,234.25 GiB")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (10 * GIB + MIB, "10.00 GiB"),
        (10 * GIB - MIB, "10,239.0 MiB"),
        (-10 * GIB - MIB, "-10.00 GiB"),
        (GIB, "1.00 GiB"),
        (GIB + GIB // 5, "1,228.8 MiB"),
        (3 * GIB // 4, "768.0 MiB"),
    ],
)
def test_from_10_gibibytes_on_amounts_are_gibibytes(count: int, text: str) -> None:
    assert human(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9.99, "9.99 s"),
        (10, "10.0 s"),
        (10.04, "10.0 s"),
        (119.9, "119.9 s"),
        (120, "2 min 00 s"),
        (121, "2 min 01 s"),
        (3661, "61 min 01 s"),
        (7200, "2 h 00 min"),
        (7260, "2 h 01 min"),
        (3_600_000, "1,000 h 00 min"),
    ],
)
def test_times_change_their_form_at_10_seconds_2_minutes_and_2_hours(value: float, text: str) -> None:
    assert seconds(value) == text

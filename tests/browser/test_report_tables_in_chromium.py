"""Tables, search, sorting and the axis of time of the HTML report in a real browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from browser.chromium import Browser, Page
from browser.pages import HOSTILE, PRESSED, column, written
from report_runs import Recipe, write_run
from wanvram.report.html import html_report
from wanvram.report.runs import Run, find_runs


def typed(page: Page, selector: str, text: str, index: int = 0) -> None:
    """What is searched for, into the field at that index."""
    page.value(f"(() => {{ const i = document.querySelectorAll({selector!r})[{index}]; i.value = {text!r};"
               " i.dispatchEvent(new Event('input')); })()")  # fmt: skip
    page.settle()


AXIS = ".axes button"
RIBBON = "[...document.querySelectorAll('.ribbon .stage')].map((n) => [n.textContent, parseFloat(n.style.width)])"


def timed(run: Run, seconds: dict[str, float | None]) -> Run:
    """The run with other times of its stages."""
    stages = [replace(span, seconds=seconds.get(span.name)) for span in run.record.stages]
    return replace(run, record=replace(run.record, stages=stages))


def test_a_table_sorts_by_the_column_whose_head_is_clicked(several: Page) -> None:
    names = column(several, "Runs", 0)
    peaks = column(several, "Runs", 2)
    several.click("thead button", 2)
    ordered = column(several, "Runs", 2)
    assert ordered == sorted(peaks, key=lambda text: -float(text.replace(",", "")))
    several.click("thead button", 2)
    assert column(several, "Runs", 2) == ordered[::-1]
    assert several.value("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "ascending"
    assert sorted(column(several, "Runs", 0)) == sorted(names)
    assert several.troubles() == []


def test_every_head_of_every_table_is_a_button_reached_with_the_keyboard_that_sorts(several: Page) -> None:
    several.wait("document.querySelectorAll('.tile').length > 5")
    heads = "[...document.querySelectorAll('thead th')]"
    assert several.value(f"{heads}.length") > 50
    assert (
        several.value(f"{heads}.filter((h) => !h.querySelector('button') || h.querySelector('button').tabIndex).length")
        == 0
    )
    unsorted = f"{heads}.filter((h) => {{ h.querySelector('button').click(); return !h.getAttribute('aria-sort'); }})"
    assert several.value(f"{unsorted}.length") == 0
    several.value("document.querySelectorAll('.dense thead button')[3].focus()")
    several.key("Enter")
    assert several.value("document.activeElement.closest('th').ariaSort") in ("ascending", "descending")
    assert several.troubles() == []


def test_the_columns_of_shown_and_pinned_runs_sort_by_what_is_chosen(several: Page) -> None:
    several.click("input[name=show]", 3)
    several.click(".dense thead button", 3)
    assert column(several, "Runs", 0)[0] == HOSTILE
    several.click(".dense thead button", 4)
    assert sorted(column(several, "Runs", 0)[:2]) == ["lean", "real"]


def test_numbers_sort_as_numbers_also_where_they_are_texts_and_texts_come_after_them(
    browser: Browser, tmp_path: Path
) -> None:
    run = find_runs([write_run(tmp_path / "run", Recipe())])[0]
    config = {"k": {str(i): value for i, value in enumerate(["10", -5, "b", 9.5, "a10", "a9", "1e3", True])}}
    path = tmp_path / "report.html"
    path.write_text(html_report([replace(run, record=replace(run.record, config=config))]), encoding="utf-8")
    page = browser.open(path)
    page.value("document.querySelectorAll('details').forEach((d) => d.open = true)")
    page.click("details thead button", 1)
    assert column(page, "Configuration", 1) == ["-5", "9.5", "10", "1e3", "a9", "a10", "b", "true"]
    page.click("details thead button", 1)
    assert column(page, "Configuration", 1) == ["true", "b", "a10", "a9", "1e3", "10", "9.5", "-5"]
    stages = "[...document.querySelectorAll('table')].find((t) => t.caption.textContent === 'Stages')"
    activation = f"{stages}.tHead.querySelectorAll('button')[4].click()"
    page.value(activation)  # loading has none
    assert column(page, "Stages", 4) == ["3,858.0", "500.0", "80.0", "–", "–", "–"]
    page.value(activation)
    assert column(page, "Stages", 4) == ["80.0", "500.0", "3,858.0", "–", "–", "–"]


def test_a_search_leaves_the_rows_that_have_every_word_and_says_how_many(several: Page) -> None:
    typed(several, ".dense input[type=search]", "MEASURED real")
    assert column(several, "Runs", 0) == ["real"]
    assert several.text(".dense .found") == "1 of 4"
    several.click(".dense thead button", 0)
    assert column(several, "Runs", 0) == ["real"]
    typed(several, ".dense input[type=search]", "no such run")
    assert (column(several, "Runs", 0), several.text(".dense .found")) == ([], "0 of 4")
    typed(several, ".dense input[type=search]", " ")
    assert (len(column(several, "Runs", 0)), several.text(".dense .found")) == (4, "")
    assert several.value("[...document.querySelectorAll('input[type=search]')].every((i) => i.ariaLabel.length > 10)")
    assert several.troubles() == []


def test_a_search_shows_what_lies_beyond_the_rows_that_are_shown_at_first(several: Page) -> None:
    caption = "A: real · B: lean"
    assert "decode: peak allocated" not in column(several, caption, 0)
    several.value("document.querySelector('details').open = true")
    typed(several, "details input[type=search]", "decode: peak allocated")
    assert column(several, caption, 0) == ["decode: peak allocated"]
    typed(several, "details input[type=search]", "")
    assert len(column(several, caption, 0)) == 9


def test_a_search_in_the_treemap_dims_the_tiles_that_do_not_match_and_sums_those_that_do(single: Page) -> None:
    single.wait("document.querySelectorAll('.tile').length > 5")
    typed(single, ".tools > .search input", "rms_norm")
    bright = "[...document.querySelectorAll('.tile:not(.dimmed)')].map((t) => t.dataset.text)"
    assert [("rms_norm" in text) for text in single.value(bright)] == [True]
    assert single.text(".tools > .search .found") == "1 of 9: 241.1 MiB"
    single.value("document.querySelector('.choice select').value = 'module'")
    typed(single, ".tools > .search input", "")
    assert single.value("document.querySelectorAll('.tile.dimmed').length") == 0
    assert single.troubles() == []


def test_the_chart_switches_between_events_and_the_seconds_that_were_recorded(browser: Browser, tmp_path: Path) -> None:
    run = find_runs([write_run(tmp_path / "run", Recipe())])[0]
    slow = timed(run, {"encode_text": 1.0, "denoise": 90.0, "decode": 9.0})
    page = browser.open(written([slow], tmp_path / "report.html"))
    page.wait("document.querySelector('.u-over') !== null")
    assert page.text(".axis") == "allocator event"
    events = dict(page.value(RIBBON))
    assert len(events) == 6
    page.click(AXIS, 1)
    assert page.text(".axis") == "seconds since the start (loading has no known time and takes none here)"
    seconds = dict(page.value(RIBBON))
    assert list(seconds) == ["encode_text", "denoise", "decode"]
    assert seconds["denoise"] / seconds["decode"] == pytest.approx(10, rel=0.01)
    assert events["denoise"] / events["decode"] < 5
    assert page.value("[...document.querySelectorAll('.axes button')].map((b) => b.ariaPressed)") == ["false", "true"]
    page.drag(".u-over", 0.93, 0.99)
    assert page.text(PRESSED).startswith("peak ·"), "decode has the last nine per cent"
    page.click(".ribbon .stage", 0)
    assert page.text(PRESSED).startswith("peak of decode ·")
    page.value("document.querySelectorAll('.axes button')[0].focus()")
    page.key("Enter")
    assert dict(page.value(RIBBON)) == events
    assert page.troubles() == []


def test_a_step_takes_its_own_time_on_the_axis_of_seconds(browser: Browser, tmp_path: Path) -> None:
    run = timed(
        find_runs([write_run(tmp_path / "run", Recipe())])[0], {"encode_text": 1.0, "denoise": 20.0, "decode": 9.0}
    )
    denoise = run.record.stages[4]
    steps = [replace(denoise, name="step", kind="step", seconds=s, repeats=n) for s, n in ((10.0, 1), (2.0, 3))]
    run.record.stages[4] = replace(denoise, children=steps)
    page = browser.open(written([run], tmp_path / "report.html"))
    page.wait("document.querySelector('.u-over') !== null")
    page.click(AXIS, 1)
    widths = page.value("[...document.querySelectorAll('.ribbon .step')].map((n) => parseFloat(n.style.width))")
    assert [width / widths[1] for width in widths] == pytest.approx([5, 1, 1, 1], rel=0.01)
    assert page.troubles() == []


def test_where_a_time_is_unknown_or_time_is_the_axis_already_there_is_no_switch(
    browser: Browser, tmp_path: Path
) -> None:
    run = find_runs([write_run(tmp_path / "run", Recipe())])[0]
    measured = find_runs([write_run(tmp_path / "measured", Recipe(simulated=False))])[0]
    for i, one in enumerate(
        (timed(run, {"encode_text": 1.0, "denoise": None, "decode": 9.0}), timed(run, {}), measured)
    ):
        page = browser.open(written([one], tmp_path / f"{i}.html"))
        page.wait("document.querySelector('.u-over') !== null")
        assert page.value("document.querySelectorAll('.axes').length") == 0
        assert page.troubles() == []

"""The HTML report in a real browser: opened from disk without network, used with mouse and keyboard."""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from pathlib import Path

import pytest

from browser.chromium import Browser, Page
from browser.pages import HOSTILE, PRESSED, column, report, written
from report_runs import Recipe, write_run
from wanvram.record import Failure
from wanvram.report.html import html_report
from wanvram.report.runs import find_runs
from wanvram.units import GIB


def test_the_page_opens_offline_without_a_complaint_and_states_the_peak(single: Page) -> None:
    assert single.text("h1") == (
        "This run will need 6,162.0 MiB of device memory; it does not fit the budget of 6.00 GiB: 18.0 MiB too much; "
        "the smallest standard card that holds it has 8 GB."
    )
    single.wait("document.querySelectorAll('.tile').length > 5")
    assert single.value("document.querySelectorAll('.chart canvas').length") == 1
    assert single.troubles() == []


def test_brushing_the_timeline_zooms_and_changes_what_was_alive(single: Page) -> None:
    single.wait("document.querySelector('.u-over') && document.querySelectorAll('.tile').length > 5")
    assert single.text(PRESSED).startswith("peak ·")
    before, stages = single.text(".said"), single.value("document.querySelectorAll('.ribbon .stage').length")
    single.drag(".u-over", 0.02, 0.2)
    assert single.text(PRESSED).startswith("peak of load ")
    assert single.text(".said") != before
    assert single.value("document.querySelectorAll('.ribbon .stage').length") < stages
    assert single.value("[...document.querySelectorAll('.tile')].every((t) => t.dataset.text.includes('weights'))")
    assert single.troubles() == []


def test_a_click_on_the_chart_and_on_a_stage_chooses_the_moment_there(single: Page) -> None:
    single.wait("document.querySelector('.u-over') !== null")
    single.click(".ribbon .stage", 4)
    assert single.text(PRESSED).startswith("peak of denoise ·")
    single.drag(".u-over", 0.995, 0.996)  # under four pixels is a click
    assert "5,134.0 MiB" in single.text(PRESSED)
    single.click(".u-over")  # its middle, event 96 of 192: encode_text peaked at 85, denoise at 167
    assert single.text(PRESSED).startswith("peak of encode_text ·")
    assert single.value("document.querySelectorAll('.ribbon .stage').length") == 6


def test_the_chart_and_the_treemap_are_walked_with_the_keyboard(single: Page) -> None:
    single.wait("document.querySelectorAll('.tile').length > 5")
    single.value("document.querySelector('.chart').focus()")
    single.key("ArrowLeft")
    chosen = single.text(PRESSED)
    single.key("ArrowLeft")
    assert single.text(PRESSED) != chosen
    single.key("+")
    zoomed = single.value("document.querySelectorAll('.ribbon > *').length")
    single.key("0")
    assert single.value("document.querySelectorAll('.ribbon > *').length") > zoomed
    single.value("document.querySelector('.treemap').focus()")
    single.key("ArrowRight")
    assert single.text(".tile.current b") in single.text(".detail")
    assert single.troubles() == []


def test_a_tile_says_what_it_is_before_where_it_is_and_no_machine_names(browser: Browser, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", Recipe())
    file = directory / "timeline.json"
    text = file.read_text().replace('"operation": "conv3d"', '"operation": "aten.empty.memory_format"')
    text = text.replace('"operation": "silu"', '"operation": "wanvram.conv3d.default workspace"')
    file.write_text(text.replace('"operation": "cat"', '"operation": "aten::cat"'))
    page = browser.open(written(find_runs([directory]), tmp_path / "report.html"))
    page.wait("document.querySelectorAll('.tile').length > 5")
    tiles = page.value("[...document.querySelectorAll('.tile')].map((t) => [...t.children].map((c) => c.textContent))")
    assert ["[1, 96, 4, 480, 832] float16", "1,929.0 MiB", "decoder.up.0"] in tiles
    assert ["weights of vae", "280.0 MiB", "blocks"] in tiles
    said = page.value("[...document.querySelectorAll('.tile')].map((t) => t.dataset.text)")
    assert "[1, 192, 4, 480, 832] float16 cat · 964.5 MiB · 18.8 % · 2 × · vae / decode / decoder.up.1" in said
    assert any("float16 conv3d workspace · " in text for text in said)
    assert not any("aten" in text or "wanvram" in text for text in said)
    assert page.troubles() == []


def test_the_areas_of_the_treemap_are_the_sizes_of_the_groups(single: Page) -> None:
    single.wait("document.querySelectorAll('.tile').length > 5")
    single.value("document.querySelector('.choice select').value = 'module'")
    single.value("document.querySelector('.choice select').dispatchEvent(new Event('change'))")
    single.wait("document.querySelectorAll('.tile').length > 5")
    inside = "[...document.querySelectorAll('.tile')].filter((t) => t.dataset.text.includes('decoder.up'))"
    size = "parseFloat(/([\\d,.]+) MiB/.exec(t.dataset.text)[1].replace(',', ''))"
    area = "parseFloat(t.style.width) * parseFloat(t.style.height)"
    share = [area / size for area, size in single.value(f"{inside}.map((t) => [{area}, {size}])")]
    # Heads of families take 18 pixels; apart from that the scale is one.
    assert max(share) / min(share) < 1.25


def test_the_holes_of_the_segments_add_up_to_what_is_reserved_but_not_allocated(single: Page) -> None:
    assert "11 segments reserve 5,562.0 MiB; 428.0 MiB of it (7.7 %) holds no tensor" in single.value(
        "document.body.textContent"
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_of_several_runs_bottleneck_why_and_change_stand_above_the_runs_on_the_first_screen(
    browser: Browser, tmp_path: Path, language: str
) -> None:
    recipes = [Recipe(f"matrix-full-no_offload-no_attention_slicing-{i}", offload=i > 3) for i in range(15)]
    page = browser.open(report(tmp_path, *recipes, language=language), width=1440, height=900)
    bottom = page.value("document.querySelector('.answer').getBoundingClientRect().bottom")
    assert page.value("document.querySelectorAll('.answer > p:not(.kind)').length") == 2
    assert page.value("[...document.querySelectorAll('.answer > p > b')].every((b) => b.textContent.length > 3)")
    runs = page.value("document.querySelector('.dense thead').getBoundingClientRect().bottom")
    assert bottom < runs < 700
    parts = "document.querySelectorAll('.answer, .dense table, .chart')"
    assert page.value(f"[...{parts}].map((n) => n.className || n.tagName)") == ["answer", "TABLE", "chart"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_at_1440_pixels_the_table_of_runs_shows_every_column(browser: Browser, tmp_path: Path, language: str) -> None:
    name = "matrix-full-no_offload-no_attention_slicing"
    recipes = Recipe(name), Recipe(name, simulated=False, budget_bytes=6 * GIB), Recipe("b", budget_bytes=6 * GIB)
    page = browser.open(report(tmp_path, *recipes, language=language), width=1440)
    assert page.value("document.querySelectorAll('.dense thead th').length") == 14
    assert (
        page.value(
            "(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth)(document.querySelector('.dense .scroll'))"
        )
        == 0
    )
    assert page.value("document.querySelector('.dense table').getBoundingClientRect().right") <= 1440


def test_the_comparison_is_one_line_until_a_run_is_pinned(several: Page) -> None:
    line = "A: real · B: lean · whole run: peak device -1,120.0 MiB (-18.1 %)"
    assert several.text("details > summary") == line
    assert not several.value("document.querySelector('details').open")
    several.click("input[name=pin]", 2)
    assert several.value("document.querySelector('details').open")
    assert several.text("details > summary").startswith("A: lean · B: baseline · ")
    assert several.troubles() == []


def test_what_was_alive_is_grouped_by_shape_and_type_when_asked(single: Page) -> None:
    single.value("document.querySelector('.choice select').value = 'shape'")
    single.value("document.querySelector('.choice select').dispatchEvent(new Event('change'))")
    single.wait("[...document.querySelectorAll('.family')].some((f) => f.textContent.startsWith('['))")
    names = single.value("[...document.querySelectorAll('.family')].map((f) => f.textContent).filter(Boolean)")
    assert names[0] == "[1, 96, 4, 480, 832] float16 1,929.0 MiB"
    assert all(" float16 " in name for name in names)
    assert single.troubles() == []


def test_the_chart_of_a_run_that_found_its_card_full_has_the_card_as_its_limit(
    browser: Browser, tmp_path: Path
) -> None:
    run = find_runs([write_run(tmp_path / "run", Recipe())])[0]
    failed = replace(run.record, device="simulated:rtx4060", failure=Failure("oom", "Full.", stage="decode"))
    path = tmp_path / "report.html"
    path.write_text(html_report([replace(run, record=failed)]), encoding="utf-8")
    page = browser.open(path)
    page.wait("document.querySelector('.u-over') !== null")
    assert page.text(".legend li:last-child") == "NVIDIA GeForce RTX 4060 8GB 8,028.2 MiB"
    assert page.troubles() == []


def test_two_pinned_runs_are_compared_and_other_pins_change_the_comparison(several: Page) -> None:
    highest_and_lowest = "A: real · B: lean"
    assert column(several, highest_and_lowest, 0)[0] == "whole run: peak device"
    assert column(several, highest_and_lowest, 3)[0] == "-1,120.0"
    different = ["name", "model_config.offload", "model_config.device"]
    assert column(several, "Differences of configuration", 0) == different
    several.click("input[name=pin]", 2)  # a third pin takes the place of the first
    assert column(several, "A: lean · B: baseline", 3)[0] == "+1,078.0"
    several.click("input[name=pin]", 0)
    assert several.value("document.body.textContent.includes('Pin two runs')")


def test_a_prediction_stands_beside_its_measurement_with_signed_errors(several: Page) -> None:
    caption = "predicted: baseline · measured: real"
    assert column(several, caption, 3)[:3] == ["-42.0", "-42.0", "-38.6"]
    assert column(several, caption, 4)[0] == "-0.68 %"


def test_a_prediction_follows_its_measurement_in_the_table_of_runs_and_says_whose_it_is(several: Page) -> None:
    assert column(several, "Runs", 0) == ["lean", "real", "baseline", HOSTILE]
    assert column(several, "Runs", 6)[1:3] == ["measured", "prediction of real"]


def test_many_pairs_are_a_line_each_and_their_figures_fold_open(browser: Browser, tmp_path: Path) -> None:
    real = Recipe("real", simulated=False, timeline=False)
    page = browser.open(
        report(tmp_path, Recipe(), real, Recipe(offload=True), Recipe("lean", simulated=False, offload=True))
    )
    caption = "Predicted against measured"
    assert (column(page, caption, 0), column(page, caption, 1)) == (["real", "lean"], ["0.00 %", "0.00 %"])
    assert page.value("[...document.querySelectorAll('details > summary')].map((s) => s.textContent)")[-2:] == [
        "real",
        "lean",
    ]
    page.click("input[name=show]", 1)
    page.wait("document.querySelectorAll('.tile').length > 5")
    assert page.troubles() == []


def test_another_run_is_shown_when_it_is_chosen(several: Page) -> None:
    assert several.text(".answer .kind").startswith("lean · Predicted")
    several.click("input[name=show]", 1)
    assert several.text(".answer .kind") == "real · Measured (cuda:NVIDIA H200)"
    assert several.value("document.querySelectorAll('.chart canvas').length") == 1
    assert several.troubles() == []


def test_hostile_names_and_prompts_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(report(tmp_path, Recipe(HOSTILE, prompt=HOSTILE, timeline=False), Recipe("plain")))
    assert HOSTILE in column(page, "Runs", 0)
    page.click("input[name=show]", 0)
    page.click("summary", 1)
    assert HOSTILE in column(page, "Configuration", 1)
    assert page.value("[window.broken === undefined, document.images.length]") == [True, 0]
    assert page.troubles() == []


def test_a_csv_has_the_exact_bytes(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(report(tmp_path, Recipe("=1+1")))
    page.wait("document.querySelector('.u-over') !== null")
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for name in ("stages", "timeline", "alive", "segments", "configuration"):
        page.value("document.querySelectorAll('details').forEach((d) => d.open = true)")
        page.click(f'a[download="{name}.csv"]')
        wait_for(tmp_path / f"{name}.csv")
    stages = read(tmp_path / "stages.csv")
    assert (stages[-1]["name"], stages[-1]["peak_allocated_bytes"]) == ("decode", str(5134 * 2**20))
    assert sum(int(row["bytes"]) for row in read(tmp_path / "alive.csv")) == 5134 * 2**20
    assert sum(int(row["free_bytes"]) for row in read(tmp_path / "segments.csv")) == 428 * 2**20
    assert max(int(row["allocated_bytes"]) for row in read(tmp_path / "timeline.csv")) == 5134 * 2**20
    assert {"setting": "name", "value": "'=1+1"} in read(tmp_path / "configuration.csv")  # no formula
    assert page.troubles() == []


def wait_for(path: Path) -> None:
    end = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} was not downloaded"
        time.sleep(0.02)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_at_390_pixels_nothing_sticks_out_sideways(browser: Browser, tmp_path: Path, language: str) -> None:
    path = report(tmp_path, Recipe("a_rather_long_name_of_a_configuration" * 3), Recipe("b"), language=language)
    page = browser.open(path, width=390, height=844)
    page.wait("document.querySelectorAll('.tile').length > 5")
    assert page.value("document.documentElement.scrollWidth") <= 390
    assert page.troubles() == []


@pytest.mark.parametrize("width", [390, 1440])
def test_the_table_of_runs_scrolls_in_its_own_box_and_names_break_after_dashes_only(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    name = "matrix-block-no_offload-no_attention_slicing"
    page = browser.open(report(tmp_path, Recipe(name), Recipe("b")), width=width)
    page.wait("document.querySelectorAll('.tile').length > 5")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.value("[...document.querySelectorAll('table')].every((t) => t.closest('.scroll'))")
    words = page.value(
        f"[...[...document.querySelectorAll('tbody th')].find((h) => h.textContent === '{name}').childNodes]"
        ".filter((n) => n.nodeType === 3).map((n) => {"
        " const r = document.createRange(); r.selectNode(n); return [n.data, r.getClientRects().length]; })"
    )
    assert words == [
        ["matrix-", 1],
        ["block-", 1],
        ["no_", 1],
        ["offload-", 1],
        ["no_", 1],
        ["attention_", 1],
        ["slicing", 1],
    ]


def test_dark_follows_the_system_and_the_button_overrules_it(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(report(tmp_path, Recipe()), scheme="dark")
    color = "getComputedStyle(document.body).backgroundColor"
    assert page.value(color) == "rgb(20, 23, 27)"
    page.click(".theme")
    assert page.value(color) == "rgb(255, 255, 255)"


def test_on_the_cpu_nothing_is_said_of_reserved_memory_and_fragmentation(browser: Browser, tmp_path: Path) -> None:
    run = find_runs([write_run(tmp_path / "run", Recipe(timeline=False))])[0]
    cpu = replace(run, record=replace(run.record, device="cpu", simulated=False))
    page = browser.open(written([cpu, replace(cpu, label="b")], tmp_path / "report.html"))
    page.wait("document.querySelectorAll('.ribbon .stage').length === 6")
    said = "[...document.querySelectorAll('th, .legend li, .stat dt')].map((n) => n.textContent).join(' ')"
    assert not any(word in page.value(said) for word in ("reserved", "fragmentation"))
    assert "peak allocated" in page.value(said)
    assert page.troubles() == []


def test_everything_clickable_has_a_name_and_every_table_a_caption(several: Page) -> None:
    several.wait("document.querySelectorAll('.tile').length > 5")
    nameless = "(n) => !(n.textContent.trim() || n.getAttribute('aria-label') || n.closest('label'))"
    assert several.value(f"[...document.querySelectorAll('button, a, input, select')].filter({nameless}).length") == 0
    assert several.value("[...document.querySelectorAll('table')].every((t) => t.caption.textContent.length > 0)")
    assert several.value("document.querySelectorAll('h1').length") == 1


def test_a_run_without_a_timeline_draws_its_stages_and_says_so(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(report(tmp_path, Recipe(timeline=False)))
    page.wait("document.querySelectorAll('.ribbon .stage').length === 6")
    assert page.value("document.body.textContent.includes('has no recorded timeline')")
    assert page.value("document.querySelectorAll('.treemap').length") == 0
    assert page.troubles() == []

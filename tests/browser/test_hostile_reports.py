"""A hundred reports of runs by somebody who means harm: nothing in them is executed, and the page still works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from browser.chromium import Browser, Page
from browser.hostile import TEXTS, hostile_runs
from wanvram.report.html import html_report

REPORTS = 100
BATCH = 10

# Everything a reader can do to the page, then what would be there if anything had been taken for more than text.
USE = """(async () => {
  const wait = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  document.querySelectorAll("details").forEach((node) => (node.open = true));
  await wait();
  document.querySelectorAll(".axes button, thead button, .moments button, .more").forEach((node) => node.click());
  await wait();
  for (const input of document.querySelectorAll("input[type=search]")) {
    input.value = %s;
    input.dispatchEvent(new Event("input"));
    input.value = "";
    input.dispatchEvent(new Event("input"));
  }
  for (const choice of document.querySelectorAll("select option")) {
    choice.parentNode.value = choice.value;
    choice.parentNode.dispatchEvent(new Event("change"));
    await wait();
  }
  for (const name of ["show", "pin"]) [...document.querySelectorAll(`input[name=${name}]`)].forEach((box) => box.click());
  await wait();
  return [
    window.broken === undefined,
    document.querySelectorAll("img, iframe, object, embed, svg, form, link, base").length,
    document.querySelectorAll("script").length,
    [...document.querySelectorAll("*")].filter((n) => [...n.attributes].some((a) => /^on/i.test(a.name))).length,
    [...document.querySelectorAll("a")].filter((a) => !/#$/.test(a.href) && !a.href.startsWith("blob:")).length,
    document.querySelectorAll("h1").length,
    document.documentElement.scrollWidth <= innerWidth,
  ];
})()"""


def test_the_texts_are_told_apart_by_what_they_try() -> None:
    assert len(set(TEXTS)) == len(TEXTS) > 30


@pytest.mark.parametrize("first", range(0, REPORTS, BATCH))
def test_nothing_in_a_hostile_report_is_executed_and_all_of_it_can_be_used(
    browser: Browser, tmp_path: Path, first: int
) -> None:
    for seed in range(first, first + BATCH):
        runs = hostile_runs(tmp_path / f"{seed}", seed)
        file = tmp_path / f"{seed}.html"
        file.write_text(html_report(runs, "zh" if seed % 3 == 0 else "en"), encoding="utf-8")
        page: Page = browser.open(file, width=390 if seed % 2 else 1440)
        found = page.value(USE % json.dumps(TEXTS[seed % len(TEXTS)]))
        assert found == [True, 0, 3, 0, 0, 1, True], f"seed {seed}"
        assert page.troubles() == [], f"seed {seed}"
        page.send("Page.close")

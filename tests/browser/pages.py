"""Reports written for the tests in a browser, and what is read from their pages."""

from __future__ import annotations

from pathlib import Path

from browser.chromium import Page
from report_runs import Recipe, write_run
from wanvram.report.html import html_report
from wanvram.report.runs import Run, find_runs

__all__ = ["HOSTILE", "PRESSED", "column", "report", "written"]

HOSTILE = '</script><img src=x onerror="window.broken=1">'
PRESSED = '.moments button[aria-pressed="true"]'


def report(directory: Path, *recipes: Recipe, language: str = "en") -> Path:
    runs = find_runs([write_run(directory / f"run{i}", recipe) for i, recipe in enumerate(recipes)])
    path = directory / "report.html"
    path.write_text(html_report(runs, language), encoding="utf-8")
    return path


def column(page: Page, caption: str, number: int) -> list[str]:
    """The texts of a column of the table with that caption."""
    table = f"[...document.querySelectorAll('table')].find((t) => t.caption.textContent === {caption!r})"
    return list(page.value(f"[...{table}.tBodies[0].rows].map((row) => row.cells[{number}].textContent)"))


def written(runs: list[Run], path: Path, language: str = "en") -> Path:
    path.write_text(html_report(runs, language), encoding="utf-8")
    return path

"""One Chromium for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser.chromium import Browser, Page, required_chromium
from browser.pages import HOSTILE, report
from report_runs import Recipe
from wanvram.units import GIB


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(required_chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def single(browser: Browser, tmp_path: Path) -> Page:
    return browser.open(report(tmp_path, Recipe(budget_bytes=6 * GIB)))


@pytest.fixture
def several(browser: Browser, tmp_path: Path) -> Page:
    recipes = Recipe(), Recipe("lean", offload=True), Recipe("real", simulated=False, factor=1.01), Recipe(HOSTILE)
    return browser.open(report(tmp_path, *recipes))

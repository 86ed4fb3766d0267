"""`make chromium` installs what the browser tests need where it may, and says in a line where it may not."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from browser import chromium, install

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As if there were no Chromium on it; `apt-get` says what `output` holds and installs it if it is empty."""
    state: dict[str, Any] = {"chromium": None, "apt": "/usr/bin/apt-get", "user": 0, "output": "", "commands": []}

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        state["commands"].append(command)
        if not state["output"] and "install" in command:
            state["chromium"] = "/usr/bin/chromium"
        return subprocess.CompletedProcess(
            command, 100 if state["output"] else 0, "Reading lists...\n", state["output"]
        )

    for module in (install, chromium):
        monkeypatch.setattr(module, "find_chromium", lambda: state["chromium"])
    monkeypatch.setattr(install.shutil, "which", lambda name: state["apt"])
    monkeypatch.setattr(install.os, "geteuid", lambda: state["user"])
    monkeypatch.setattr(install.subprocess, "run", run)
    return state


def test_nothing_is_done_or_said_where_chromium_is(machine: dict[str, Any]) -> None:
    machine["chromium"] = "/usr/bin/chromium"
    assert (install.install(), machine["commands"]) == ("", [])


def test_root_of_a_debian_gets_it_and_none_of_the_output(machine: dict[str, Any], capfd: Any) -> None:
    assert install.install() == ""
    assert [command[-1] for command in machine["commands"]] == ["update", "fonts-liberation"]
    assert capfd.readouterr().out == "make: installing chromium with apt-get, for the browser tests\n"


@pytest.mark.parametrize("lacks", [{"user": 1000}, {"apt": None}])
def test_others_are_told_in_one_line_what_is_skipped(machine: dict[str, Any], lacks: dict[str, Any]) -> None:
    machine |= lacks
    said = install.install()
    assert said.startswith("the browser tests need Chromium and are skipped without it")
    assert (said.count("\n"), machine["commands"]) == (0, [])


def test_a_failure_is_the_last_line_that_apt_get_said(machine: dict[str, Any]) -> None:
    machine["output"] = "W: something\nE: Unable to fetch some archives\n"
    said = install.install()
    assert said.endswith("update: E: Unable to fetch some archives)")
    assert said.startswith("chromium could not be installed, so the browser tests are skipped")


@pytest.mark.parametrize(("value", "outcome"), [("", pytest.skip), ("false", pytest.skip), ("true", pytest.fail)])
def test_ci_fails_instead_of_skipping_the_browser_tests(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, value: str, outcome: Any
) -> None:
    monkeypatch.setenv("CI", value)
    with pytest.raises(outcome.Exception, match="none of chromium, "):
        chromium.required_chromium()
    machine["chromium"] = "/usr/bin/chromium"
    assert chromium.required_chromium() == "/usr/bin/chromium"


def test_make_test_installs_it_first_and_ci_says_that_it_is_ci() -> None:
    assert "test: $(STAMP) chromium\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "export CI=${CI:-true}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")

"""That a package could be imported is kept with what was installed then, and asked again when that has changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wanvram.config import Request, RunConfig
from wanvram.kernels.attention_backends import Backend
from wanvram.machine import imports
from wanvram.run.attention import attention_of, card_like
from wanvram.simulate.gpus import GPUS

PACKAGE = "flash-attn-4"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    imports._fingerprint.cache_clear()
    yield tmp_path / "cache" / "wanvram" / "imported.json"
    imports._fingerprint.cache_clear()


def asked(monkeypatch: pytest.MonkeyPatch, reason: str | None, *, running: bool = False) -> tuple[str, int]:
    """What auto takes on an H200 that is here, and how often the package was imported for it. running: by the process that computes."""
    imported: list[Backend] = []
    monkeypatch.setattr(Backend, "version", lambda self: "4.0.0b36" if self.package else None)
    monkeypatch.setattr("wanvram.run.attention.why_broken", lambda backend: imported.append(backend) or reason)
    request = Request.for_task("t2v-1.3B", size="832*480", frame_num=81)
    config = RunConfig("attention", "", "cuda", request)
    return attention_of(config, card_like(GPUS["h200"], here=True), running=running).taken, len(imported)


def test_a_package_that_could_be_imported_is_not_imported_for_the_next_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, None) == ("fa4", 1)
    assert asked(monkeypatch, None) == ("fa4", 0)
    assert imports.imported_before(PACKAGE)
    assert not imports.imported_before("another")


def test_one_that_could_not_is_tried_each_time(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert asked(monkeypatch, "no kernels") == ("cudnn", 1)
    assert asked(monkeypatch, "no kernels") == ("cudnn", 1)
    assert not cache.exists()


def test_the_process_that_computes_imports_it_and_what_it_finds_broken_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a change of the driver, which no package shows."""
    assert asked(monkeypatch, None) == ("fa4", 1)
    assert asked(monkeypatch, None, running=True) == ("fa4", 1)
    assert asked(monkeypatch, "no driver", running=True) == ("cudnn", 1)
    assert not imports.imported_before(PACKAGE)
    assert asked(monkeypatch, "no driver") == ("cudnn", 1)


def test_an_installation_makes_it_ask_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "site"
    (place / "other-1.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(place)])
    imports.keep_imported(PACKAGE)
    assert imports.imported_before(PACKAGE)
    changes = (
        lambda: os.utime(place / "other-1.0.dist-info", (1, 1)),
        lambda: (place / "other-1.0.dist-info").rename(place / "other-1.1.dist-info"),
        lambda: (place / "third-2.dist-info").mkdir(),
    )
    for change in changes:
        change()
        imports._fingerprint.cache_clear()
        assert not imports.imported_before(PACKAGE)
        imports.keep_imported(PACKAGE)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"flash-attn-4": 3}', "{" * 5000, '{"flash-attn-4": "' + "x" * 70000 + '"}']
)
def test_a_damaged_file_is_no_answer_and_is_replaced(text: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert not imports.imported_before(PACKAGE)
    imports.keep_imported(PACKAGE)
    assert imports.imported_before(PACKAGE)


def test_without_a_home_it_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(imports, "cache_file", nobody)
    assert asked(monkeypatch, None) == ("fa4", 1)
    assert asked(monkeypatch, None) == ("fa4", 1)


def test_where_nothing_can_be_kept_it_is_asked_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert asked(monkeypatch, None) == ("fa4", 1)
    assert asked(monkeypatch, None) == ("fa4", 1)

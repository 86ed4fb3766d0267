"""A run directory with any one value replaced is read, or named in a sentence: `report` and `analyze` never crash on it."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_runs import Recipe, write_run
from wanvram.cli import analyze
from wanvram.errors import InputError, WanvramError
from wanvram.record import Failure, RunRecord, write_atomically
from wanvram.report.html import html_report
from wanvram.report.markdown import markdown_report
from wanvram.report.runs import find_runs
from wanvram.report.terminal import summarize

WRONG = ('"text"', "7", "-1", "0.5", "[]", "[1]", "{}", "null", "true", "1e999", "1e300", "9" * 400, '"\\ud800"', '""')
ADVICE = {"schema": 1, "advice": [{"change": "offload: true", "saved_bytes": 5 << 20, "seconds": 1.5}]}
FILES = ("record.json", "advice.json", "timeline.json")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small run that failed, so that every field has a value."""
    path = write_run(tmp_path / "run", Recipe(steps=2, events=3))
    record = RunRecord.read(path / "record.json")
    failure = Failure("oom", "full", "decode", "vae", 100, 35, 60, (("weights", 10),))
    parts = [replace(record.components[0], streamed_bytes=5, copy_seconds=0.5, hidden_share=0.5)]
    stages = [replace(record.stages[0], children=[record.stages[1]], notes=["a note"]), *record.stages[1:]]
    replace(record, failure=failure, components=parts, stages=stages).write(path / "record.json")
    (path / "advice.json").write_text(json.dumps(ADVICE))
    timeline = json.loads((path / "timeline.json").read_text())
    timeline["moments"] = timeline["moments"][:1]
    (path / "timeline.json").write_text(json.dumps(timeline))
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of a list the first two items, the others are like them."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def damaged(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    result = at = copy.deepcopy(data)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return result


def use_everything(directory: Path) -> None:
    """What `wanvram report` and `wanvram analyze` do with a run."""
    runs = find_runs([directory])
    written = [*(summarize(run.record) for run in runs), markdown_report(runs)]
    text, document = analyze._analyze_run(directory)
    "".join([*written, text, json.dumps(document, ensure_ascii=False, allow_nan=False)]).encode()
    html_report(runs).encode()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda text: text[:12])
def test_a_run_with_one_wrong_value_is_reported_or_named(name: str, wrong: str, directory: Path) -> None:
    data = json.loads((directory / name).read_text())
    crashes = []
    for place in places(data):
        (directory / name).write_text(json.dumps(damaged(data, place, "@")).replace('"@"', wrong))
        try:
            use_everything(directory)
        except WanvramError:
            continue
        except Exception as error:
            crashes.append(f"{place}: {error!r}")
    assert crashes == []


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("failure", "kind"), "explosion", "failure.kind is none of oom, error, interrupted"),
        (("components", 0, "hidden_share"), "much", "components.0.hidden_share is 'much'; expected a number"),
        (("components", 0, "streamed_bytes"), "much", "streamed_bytes is 'much'; expected a whole number"),
        (("config", "request"), [], "config.request is no section"),
        (("device",), 5, "device is 5; expected text"),
    ],
)
def test_a_damaged_record_names_the_file_and_the_field(
    place: tuple[Any, ...], value: Any, sentence: str, directory: Path
) -> None:
    data = json.loads((directory / "record.json").read_text())
    (directory / "record.json").write_text(json.dumps(damaged(data, place, value)))
    with pytest.raises(InputError) as caught:
        find_runs([directory])
    assert sentence in str(caught.value)
    assert "record.json" in str(caught.value) or str(directory) in str(caught.value)


def test_stages_inside_stages_without_end_are_a_sentence(directory: Path) -> None:
    data = json.loads((directory / "record.json").read_text())
    stage = data["stages"][0]
    for _ in range(100):
        stage = stage | {"children": [stage]}
    (directory / "record.json").write_text(json.dumps(data | {"stages": [stage]}))
    with pytest.raises(InputError, match="nested more than 20 deep"):
        find_runs([directory])


def test_text_that_no_file_can_hold_is_a_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(WanvramError, match="not UTF-8"):
        write_atomically(tmp_path / "record.json", "\udcff")
    assert list(tmp_path.iterdir()) == []


def test_analyze_reads_the_undamaged_run(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    analyze.prepare_parser(parser)
    assert analyze.run(parser.parse_args([str(directory)])) == 0
    assert "peak" in capsys.readouterr().out
    use_everything(directory)

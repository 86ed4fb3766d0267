"""Text and files from outside: harmless in every terminal, encoding and format, whatever they hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_trace_reader import EVENTS, op, saved

from report_runs import Recipe, write_run
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.foreign_text import MAX_SHOWN, quoted, shown, why
from wanvram.input_files import open_regular, read_text

ROOT = Path(__file__).parents[2]
HOSTILE = "\x1b]0;title\x07\x1b[31m\x00\x9b1m\u202egnp.\n\r# h\r\r<img src=x onerror=alert(1)>\u2028|`*_" + "x" * 3000
HARMFUL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ud800-\udfff]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aten::mm", "aten::mm"),
        ("grün 名字 🎬　x", "grün 名字 🎬　x"),
        ("a\nb\tc\r\nd", "a b c  d"),
        ("\x1b[31m\x00\x7f\x9b", "\\u001b[31m\\u0000\\u007f\\u009b"),
        ("\ud800\u202e", "\\ud800\\u202e"),
        ("x" * 600, "x" * 499 + "…"),
        ("\x00" * 600, ("\\u0000" * 100)[:499] + "…"),
        (None, "null"),
        ([True, {"a": "é"}], '[true, {"a": "é"}]'),
        (Path("a/b"), "a/b"),
        (7, "7"),
    ],
)
def test_text_from_outside_is_one_line_without_controls_of_at_most_500_characters(text: object, expected: str) -> None:
    assert shown(text) == expected
    assert len(shown(text)) <= MAX_SHOWN


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "'a'"),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        (10**100, "a number of over 40 digits"),
        ([1, 2, 3], "a list of 3"),
        ((1,), "a list of 1"),
        ({}, "a section of 0"),
        (b"x", "a value of a kind that has no place there"),
        ("x" * 100, "'" + "x" * 59 + "…'"),
    ],
)
def test_a_value_in_a_sentence_is_named_without_words_of_python(value: Any, expected: str) -> None:
    assert quoted(value) == expected


def raised(action: Callable[[], object]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: {}["end"], "'end' is missing"),
        (lambda: None.x, "a value is not of the kind that belongs there"),  # type: ignore[attr-defined]
        (lambda: b"a\xff".decode(), "byte 1 is no UTF-8 text"),
        (lambda: "\ud800".encode(), "it holds half of a character (a lone surrogate)"),
        (lambda: json.loads("{\n,"), "it is no JSON from line 2, column 1 on"),
        (lambda: 1 / 0, "a number is too large or too small"),
        (lambda: Path("/nowhere").read_text(), "No such file or directory"),
    ],
)
def test_what_a_reader_stumbled_over_is_said_in_words(action: Callable[[], object], expected: str) -> None:
    assert why(raised(action)) == expected


# --- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["analyze", "compare", "report"])
@pytest.mark.parametrize("what", ["fifo", "device", "long", "loop", "pipe in a folder"])
def test_what_is_no_regular_file_is_a_sentence_at_once(
    verb: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = {"device": Path("/dev/zero"), "long": tmp_path / ("a" * 400)}.get(what, tmp_path / what)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path)
    elif what == "pipe in a folder":
        path.mkdir()
        os.mkfifo(path / "record.json")
    assert main([verb, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wanvram: ")
    assert "Traceback" not in error


def test_a_file_is_read_to_its_limit_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("x" * 11)
    assert read_text(path, 11) == "x" * 11
    with pytest.raises(InputError, match="over 10 bytes"):
        read_text(path, 10)
    link = tmp_path / "zero"
    link.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        read_text(link, 10)
    with pytest.raises(InputError, match="it is a directory"):
        open_regular(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["host_1.2.pt.trace.json", "trace.json", "rank0_trace.json.gz", "chrome_trace.JSON", "profile.json", "out.json.gz"],
)
@pytest.mark.parametrize("inside", ["", "iteration_10", "a/b"])
def test_a_folder_with_a_trace_of_any_usual_name_is_analyzed(
    name: str, inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gzip

    folder = tmp_path / "logs" / inside
    folder.mkdir(parents=True)
    data = saved(tmp_path / "t.json", EVENTS).read_bytes()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (folder / "notes.txt").write_text("nothing")
    (folder / "config.json").write_text('{"a": 1}')
    assert main(["analyze", str(tmp_path / "logs")]) == 0
    assert f"{name}: {len(EVENTS)} events" in capsys.readouterr().out


def test_of_several_ranks_the_one_that_is_shown_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(3):
        saved(tmp_path / f"rank{rank}_trace.json", EVENTS, distributedInfo={"rank": rank, "world_size": 3})
    assert main(["analyze", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "holds 3 of the kind trace; this is the last by name, rank2_trace.json" in err
    assert "events of rank 2 of 3 in" in out


# --- every string of a run -------------------------------------------------------------------------------------------------


def spoiled(value: Any, keep: tuple[str, ...]) -> Any:
    """Every text but the words that the format fixes is hostile, and so is a key of every free section."""
    if isinstance(value, dict):
        return {key: item if key in keep else spoiled(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item, keep) for item in value]
    return HOSTILE if isinstance(value, str) and value not in ("active", "inactive", "events") else value


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run", Recipe(steps=2, events=3))
    advice = [{"change": HOSTILE, "saved_bytes": 5 << 20, "seconds": 1.5}]
    (run / "advice.json").write_text(json.dumps({"schema": 1, "advice": advice}))
    record = spoiled(json.loads((run / "record.json").read_text()), ("kind",))
    record["config"][HOSTILE] = HOSTILE
    record["config"]["a\r\r<img src=x onerror=alert(1)>`"] = 1
    record["notes"] = [HOSTILE]
    record["failure"] = {"kind": "oom", "message": HOSTILE, "stage": HOSTILE, "component": HOSTILE, "requested_bytes": 1,
                         "allocated_bytes": 1, "reserved_bytes": 1, "alive": [[HOSTILE, 5]]}  # fmt: skip
    (run / "record.json").write_text(json.dumps(record))
    timeline = spoiled(json.loads((run / "timeline.json").read_text()), ("kind", "axis"))
    (run / "timeline.json").write_text(json.dumps(timeline))
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["analyze"],
        ["report", "--format", "text"],
        ["report", "--format", "md"],
        ["report", "--format", "md", "--lang", "zh"],
        ["compare"],
    ],
    ids=" ".join,
)
def test_no_text_of_a_run_reaches_the_terminal_as_it_is(
    arguments: list[str], hostile_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(hostile_run.parent / "other", Recipe())
    runs = [str(hostile_run)] if arguments[0] == "analyze" else [str(hostile_run), str(other)]
    assert main([arguments[0], *runs, *arguments[1:]]) == 0
    out = capsys.readouterr().out
    assert not HARMFUL.search(out), HARMFUL.search(out)
    assert "\n# h" not in out
    assert "x" * (MAX_SHOWN + 1) not in out


def test_no_key_and_no_name_leaves_its_place_in_the_markdown_report(
    hostile_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(hostile_run), "--format", "md"]) == 0
    for line in capsys.readouterr().out.splitlines():
        bare = re.sub(r"`[^`]*`", "", line)
        assert "<img" not in bare, line
        assert line.count("`") % 2 == line.count("\\`") % 2


def test_the_name_of_a_file_and_a_flag_are_shown_harmlessly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["analyze", str(tmp_path / "\x1b[31m")], ["compare", str(tmp_path), "--fail-if", "\x1b[31m > 5"]):
        assert main(arguments) == 2
        assert not HARMFUL.search(capsys.readouterr().err)
    with pytest.raises(SystemExit) as stopped:
        main(["report", "x", "--format", "\x1b" + "x" * 70_000])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert not HARMFUL.search(error)
    assert len(error) < 700


# --- stdout ----------------------------------------------------------------------------------------------------------------


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    program = f"{sys.executable} -m wanvram"
    env = os.environ | environment
    return subprocess.run(
        ["bash", "-c", command.replace("wanvram", program, 1)],
        cwd=ROOT,
        capture_output=True,
        env=env,
        timeout=120,
        check=False,
    )


@pytest.fixture
def named(tmp_path: Path) -> Path:
    return saved(tmp_path / "名字.json", [op("名字 é 🎬 \ud800", 1, 2)])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "ascii:strict", "gbk"])
def test_text_and_json_come_out_in_any_encoding_of_stdout(encoding: str, named: Path) -> None:
    name = encoding.partition(":")[0]
    result = shell(f"wanvram analyze {named}", PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "\\ud800" in result.stdout.decode(name)
    result = shell(f"wanvram analyze {named} --json", PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    document = json.loads(result.stdout.decode(name))
    assert document["operators_by_time"][0]["name"] == "名字 é 🎬 \ud800"
    assert document["path"] == str(named)


def test_a_stdout_that_is_full_closed_or_not_read_is_no_traceback(named: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe())
    for verb in (f"analyze {named}", f"report {run} --format text", f"compare {run}", "--help"):
        full, closed = shell(f"wanvram {verb} > /dev/full"), shell(f"wanvram {verb} >&-")
        assert full.returncode == 1, verb
        assert full.stderr.startswith(b"wanvram: "), full.stderr
        assert b"No space left on device" in full.stderr
        assert closed.returncode == 0, verb
        assert b"Traceback" not in full.stderr + closed.stderr
        assert shell(f"set -o pipefail; wanvram {verb} | true").stderr == b""
    assert shell("wanvram analyze nope 2>/dev/full").returncode == 2


def test_what_no_verb_foresees_is_one_sentence_and_a_traceback_only_with_debug(
    named: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> int:
        raise KeyError("NoneType object")

    monkeypatch.setattr("wanvram.cli.analyze.run", broken)
    assert main(["analyze", str(named)]) == 1
    error = capsys.readouterr().err
    assert error == (
        "wanvram: analyze stopped at something that it does not foresee, a defect of wanvram; `wanvram analyze --debug` shows where\n"
    )
    with pytest.raises(KeyError):
        main(["analyze", str(named), "--debug"])

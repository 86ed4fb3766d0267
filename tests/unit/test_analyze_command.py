"""`wanvram analyze` tells from the content what it was given, and says what used the memory there."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_runs import Recipe, write_run
from wanvram.analysis.events import read_events
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.record import Failure, RunRecord
from wanvram.recorder.events import EventLog
from wanvram.spans import Memory
from wanvram.units import GIB, MIB, mib

ROOT = Path(__file__).parents[2]
TRACE = {
    "schemaVersion": 1,
    "traceEvents": [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 10, "dur": 5, "pid": 1, "tid": 1},
        {
            "ph": "i",
            "name": "[memory]",
            "ts": 12,
            "pid": 1,
            "tid": 1,
            "args": {
                "Device Type": 1,
                "Device Id": 0,
                "Total Allocated": 3 * MIB,
                "Total Reserved": 4 * MIB,
                "Bytes": 3 * MIB,
            },
        },
    ],
}


def snapshot() -> dict[str, Any]:
    address = 1 << 40
    event = {"addr": address, "size": 3 * MIB, "stream": 0, "time_us": 5, "frames": []}
    segment = {"device": 0, "address": address, "total_size": 20 * MIB, "stream": 0, "segment_type": "large"}
    blocks = [
        {"address": address, "size": 3 * MIB, "requested_size": 3 * MIB, "state": "active_allocated", "frames": []},
        {"address": address + 3 * MIB, "size": 17 * MIB, "requested_size": 0, "state": "inactive", "frames": []},
    ]
    trace = [event | {"action": "segment_alloc", "size": 20 * MIB}, event | {"action": "alloc"}]
    return {"segments": [segment | {"blocks": blocks}], "device_traces": [trace], "allocator_settings": {}}


def traced(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def allocated(total: int, device: tuple[int, int]) -> dict[str, Any]:
    """A [memory] event after which `total` bytes are allocated and half as much more reserved."""
    args = {
        "Device Type": device[0],
        "Device Id": device[1],
        "Bytes": 5,
        "Total Allocated": total,
        "Total Reserved": total * 3 // 2,
    }
    return {"ph": "i", "name": "[memory]", "ts": 12, "pid": 1, "tid": 1, "args": args}


def said(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert main(["analyze", str(path)]) == 0
    return capsys.readouterr().out


def logged(path: Path) -> Path:
    with EventLog(path) as log:
        log.log("load dit", Memory(300 * MIB, 320 * MIB, 900 * MIB), {"base_memory": 100 * MIB})
        log.log("denoise", Memory(500 * MIB, 640 * MIB, 1200 * MIB))
        log.log("denoise", Memory(400 * MIB, 640 * MIB, None))
    return path


def made(kind: str, folder: Path) -> Path:
    """One of each, under a name that does not say what it is."""
    path = folder / "some.file"
    if kind == "run":
        return write_run(folder / "run", Recipe())
    if kind == "trace":
        path.write_text(json.dumps(TRACE))
    elif kind == "gzipped trace":
        path.write_bytes(gzip.compress(json.dumps(TRACE).encode()))
    elif kind == "snapshot":
        path.write_bytes(pickle.dumps(snapshot()))
    else:
        logged(path)
    return path


CASES = {
    "run": ("run", "The peak is in decode (vae): ", ("peak", "allocated_bytes")),
    "events": ("events", "Highest allocated: 500.0 MiB at 'denoise'.", ("peak", "allocated_bytes")),
    "trace": ("trace", "cuda:0: peak 3.0 MiB allocated", ("memory", "0", "peak_allocated_bytes")),
    "gzipped trace": ("trace", "cuda:0: peak 3.0 MiB allocated", ("memory", "0", "peak_allocated_bytes")),
    "snapshot": ("snapshot", "GPU 0: peak 3.0 MiB allocated (3,145,728 bytes)", ("peak_allocated_bytes",)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_file_is_is_told_from_its_content(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, says, key = CASES[case]
    path = made(case, tmp_path)
    assert main(["analyze", str(path)]) == 0
    assert says in capsys.readouterr().out
    assert main(["analyze", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["schema"]) == (kind, 1)
    place = document
    for part in key:
        place = place[int(part)] if isinstance(place, list) else place[part]
    assert place >= 3 * MIB


def test_a_run_says_who_owns_the_peak_and_gives_its_record_and_analysis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_run(tmp_path / "run", Recipe())
    advice = {"schema": 1, "advice": [{"change": "--vae_tile 32", "saved_bytes": 100 * MIB, "seconds": 2.5}]}
    (directory / "advice.json").write_text(json.dumps(advice))
    assert main(["analyze", str(directory)]) == 0
    out = capsys.readouterr().out
    titles = (
        "alive at the peak, by component",
        "by stage",
        "by module",
        "by shape",
        "moment",
        "loading",
        "Fragmentation: ",
    )
    for title in titles:
        assert f"\n{title}" in out, title
    assert ["--vae_tile", "32", "100.0", "2.50", "s"] in [line.split() for line in out.splitlines()]
    assert main(["analyze", str(directory / "record.json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["analysis"]["bottleneck"]["component"] == "vae"
    assert document["stages"][0]["peak_allocated_bytes"] > 0
    assert document["advice"][0]["change"] == "--vae_tile 32"


def test_lossless_advice_comes_first_whatever_it_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_run(tmp_path / "run", Recipe())
    changes = {"--precision bf16 (lossy)": 300, "--vae_tile 32": 100, "--offload_model True": 200}
    advice = [{"change": c, "saved_bytes": n * MIB, "seconds": None} for c, n in changes.items()]
    (directory / "advice.json").write_text(json.dumps({"schema": 1, "advice": advice}))
    assert main(["analyze", str(directory)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--") and " " in line]
    assert [row.split("  ")[0] for row in rows] == [
        "--offload_model True",
        "--vae_tile 32",
        "--precision bf16 (lossy)",
    ]


def test_advice_on_a_run_that_ran_out_of_memory_says_what_it_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_run(tmp_path / "run", Recipe())
    failed = replace(RunRecord.read(directory / "record.json"), failure=Failure("oom", "no memory", stage="decode"))
    failed.write(directory / "record.json")
    figures = {"saved_bytes": 32 * GIB, "base_device_bytes": 40 * GIB, "peak_device_bytes": 8 * GIB}
    advice = {"change": "--load_strategy block", "seconds": 0.5, "fits": True} | figures
    (directory / "advice.json").write_text(json.dumps({"schema": 1, "advice": [advice]}))
    assert main(["analyze", str(directory)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["--load_strategy", "block", "32,768.0", "8,192.0", "0.50", "s", "yes"] in rows
    assert "\nEach is taken from the 40.00 GiB that this run would need on a card without limit.\n" in out
    assert main(["analyze", str(directory), "--json"]) == 0
    (read,) = json.loads(capsys.readouterr().out)["advice"]
    assert {key: read[key] for key in advice} == advice
    assert read["lossless"] is True


@pytest.mark.parametrize("item", ["x", {"change": "x", "saved_bytes": 1, "seconds": None, "fits": 1}, {"change": "x"}])
def test_damaged_advice_is_a_sentence(item: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_run(tmp_path / "run", Recipe())
    (directory / "advice.json").write_text(json.dumps({"schema": 1, "advice": [item]}))
    assert main(["analyze", str(directory)]) == 2
    assert "advice.json is damaged" in capsys.readouterr().err


def test_a_killed_run_is_analyzed_from_its_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path / "memory_events.json")
    assert main(["analyze", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 events, recorded within ")
    rows = [line.split() for line in out.splitlines()]
    assert ["load", "dit", "1", "300.0", "320.0", "900.0", "200.0"] in rows
    assert ["denoise", "2", "500.0", "640.0", "1,200.0", "-"] in rows


def test_a_run_s_events_say_what_each_stage_added_to_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "memory_events.json"
    figures = {"load dit: start": 100, "load dit": 300, "denoise: start": 250, "step 0": 900, "denoise": 950}
    path.write_text(
        json.dumps([{"name": n, "timestamp": 1.0, "allocated_bytes": b, "memory_log": ""} for n, b in figures.items()])
    )
    increments = {group.name: group.incremental_bytes for group in read_events(path).groups}
    assert increments == {
        "load dit: start": None,
        "load dit": 200,
        "denoise: start": None,
        "step 0": None,
        "denoise": 700,
    }


def test_events_of_the_specifications_own_profiler_are_read_from_their_text(tmp_path: Path) -> None:
    path = tmp_path / "memory_events.json"
    base = {"base_memory": 100 * MIB}
    events = [
        {"name": "t5", "timestamp": 1.0, "memory_log": "t5: incremental_memory=12.50 MB", "metadata": base},
        {"name": "vae", "timestamp": 3.5, "memory_log": "vae: peak_memory=200.25 MB", "metadata": None},
    ]
    path.write_text(json.dumps(events))
    summary = read_events(path)
    assert [group.incremental_bytes for group in summary.groups] == [int(12.5 * MIB), None]
    assert summary.peak is not None
    assert (summary.peak.name, summary.peak.allocated_bytes, summary.seconds) == ("vae", int(200.25 * MIB), 2.5)
    assert "memory_log" in summary.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '[{"name": 1}]',
        '[{"name": "x", "timestamp": "y"}]',
        "[" * 100_000,
        "[1",
        '[{"name":"x","timestamp":1,"allocated_bytes":"9"}]',
    ],
)
def test_damaged_events_are_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "memory_events.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"memory_events\.json"):
        read_events(path)


class Executes:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/wanvram-pwned",)


BAD = {
    "missing": None,
    "empty": b"",
    "text": b"hello",
    "truncated gzip": gzip.compress(json.dumps(TRACE).encode())[:20],
    "executing pickle": pickle.dumps(Executes()),
    "truncated pickle": pickle.dumps(snapshot())[:100],
    "binary": bytes(range(256)),
    "timeline": b'{"schema": 1, "points": []}',
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_nothing_of_these_is_a_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.bin"
    if BAD[case] is not None:
        path.write_bytes(BAD[case])
    assert main(["analyze", str(path)]) == 2
    message = capsys.readouterr().err
    assert "bad.bin" in message
    assert "Traceback" not in message
    assert not Path("/tmp/wanvram-pwned").exists()


def test_an_empty_directory_and_a_trace_elsewhere_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(tmp_path)]) == 2
    assert "no record.json" in capsys.readouterr().err
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "host_1.2.pt.trace.json").write_text(json.dumps(TRACE))
    assert main(["analyze", str(tmp_path / "trace.json")]) == 2
    assert "there is " in capsys.readouterr().err
    assert main(["analyze", str(tmp_path / "trace")]) == 0


def test_names_from_a_trace_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    hostile = dict(TRACE["traceEvents"][0]) | {"name": "\x1b[2Jaten\nfake line"}  # type: ignore[index, call-overload]
    path.write_text(json.dumps({"traceEvents": [hostile]}))
    assert main(["analyze", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\nfake line" not in out


@pytest.mark.parametrize("key", ["timestamp", "allocated_bytes", "reserved_bytes", "device_bytes", "base_memory"])
@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "1e999", "-1e999"])
def test_a_number_without_end_in_events_is_a_sentence(key: str, number: str, tmp_path: Path) -> None:
    path = logged(tmp_path / "events.json")
    text, count = re.subn(rf'("{key}": *)[0-9.]+', rf"\g<1>{number}", path.read_text(), count=1)
    assert count == 1
    path.write_text(text)
    with pytest.raises(InputError, match=r"is no memory_events\.json"):
        read_events(path)


def test_digits_without_end_in_the_text_of_an_event_are_no_figure(tmp_path: Path) -> None:
    path = tmp_path / "events.json"
    path.write_text(json.dumps([{"name": "a", "timestamp": 1, "memory_log": f"peak_memory={'9' * 180}{'0' * 180} MB"}]))
    assert read_events(path).peak is None


def test_events_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = logged(tmp_path / "events.json")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_events(path).events == 3


def test_a_run_that_ended_before_its_first_stage_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "memory_events.json").write_text("[]")
    with pytest.raises(InputError, match="holds no events: the run ended before its first stage"):
        read_events(tmp_path / "memory_events.json")
    assert main(["analyze", str(tmp_path)]) == 2


def test_the_specifications_command_works(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE))
    command = [sys.executable, "Wan-Test/analyze_trace_file.py", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "peak 3.0 MiB allocated" in result.stdout


@pytest.mark.parametrize(("device", "index"), [("cpu", (0, -1)), ("cuda:0", (1, 0))])
def test_a_trace_whose_peak_is_not_that_of_its_record_says_why(
    device: str, index: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", Recipe(simulated=False))
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record | {"device": device}))
    peak = record["peak"]["allocated_bytes"]
    (run / "trace").mkdir()
    traced(run / "trace" / "host.pt.trace.json", [allocated(2 * peak, index)])
    text = said(capsys, run / "trace" / "host.pt.trace.json")
    assert f"note: the peak here is {mib(2 * peak)}, that of the run's record {mib(peak)}: a trace covers " in text
    assert ("on the CPU a trace counts every allocation" in text) == (device == "cpu")
    path = traced(run / "trace.json", [allocated(peak, index)])
    assert "that of the run's record" not in said(capsys, path)


def test_of_a_run_on_the_cpu_no_fragmentation_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", Recipe())
    assert "fragmentation" in said(capsys, run)
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record | {"device": "cpu"}))
    assert "ragmentation" not in said(capsys, run)

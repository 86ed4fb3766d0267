"""RunRecord: the JSON of design.md, its round trip, folding of identical spans, and atomic files."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from wanvram.errors import InputError, OutputError
from wanvram.record import ComponentRecord, Failure, RankRecord, RunRecord, write_atomically
from wanvram.spans import Memory, Span, folded


def memory(allocated: int, reserved: int | None = None, device: int | None = None) -> Memory:
    return Memory(allocated, allocated if reserved is None else reserved, device)


def step(name: str, *, peak: int = 30, seconds: float = 1.0) -> Span:
    return Span(name, "step", "dit", memory(10), memory(peak), memory(10), seconds, host_rss_bytes=7)


def a_record() -> RunRecord:
    steps = [step("step 0", peak=40), *(step(f"step {i}", seconds=i) for i in range(1, 50))]
    stages = [
        Span("load dit", "load", "dit", memory(0, 0, 500), memory(10, 20, 520), memory(10, 20, 520), 0.5),
        Span("denoise", "stage", "dit", memory(10), memory(40, 50, 550), memory(10, 50, 550), 9.0, children=steps),
        Span("decode", "stage", "vae", memory(10), memory(35, 60, 540), memory(12, 60, 540)),
    ]
    return RunRecord(
        device="cuda:NVIDIA H200",
        simulated=False,
        config={"name": "x"},
        fits=True,
        budget_bytes=1000,
        components=[ComponentRecord("dit", 5, 10, 0, 30)],
        stages=stages,
        environment={"torch": "2.11"},
        host={"peak_rss_bytes": 9, "pinned_bytes": 1},
        failure=Failure("oom", "full", "decode", "vae", 100, 35, 60, (("weights", 10),)),
        notes=["a note"],
    )


def test_the_json_has_the_keys_and_figures_of_the_design() -> None:
    data = a_record().to_json()
    assert data["schema"] == 1
    assert {"device", "config", "fits", "components", "stages", "fragmentation", "fluctuation", "host"} <= set(data)
    assert data["components"][0] == {
        "name": "dit", "parameters": 5, "base_bytes": 10, "host_bytes": 0, "activation_bytes": 30,
        "streamed_bytes": 0, "copy_seconds": 0.0, "hidden_share": None,
    }  # fmt: skip
    stage = data["stages"][1]
    assert (stage["name"], stage["component"], stage["kind"]) == ("denoise", "dit", "stage")
    assert stage["start_allocated_bytes"] == 10
    assert (stage["peak_allocated_bytes"], stage["peak_reserved_bytes"], stage["peak_device_bytes"]) == (40, 50, 550)
    assert (stage["activation_bytes"], stage["seconds"], stage["end_allocated_bytes"]) == (30, 9.0, 10)


def test_a_step_takes_what_the_steps_of_all_prompts_take_also_in_a_record_without_parts() -> None:
    nothing = Memory(0, 0, None)
    steps = [Span("step 0", "step", "dit", nothing, nothing, nothing, seconds=seconds) for seconds in (1.0, 3.0, 5.0)]
    first = Span("denoise", "stage", "dit", nothing, nothing, nothing, children=steps[:1])
    second = Span("denoise 2", "stage", "dit", nothing, nothing, nothing, children=steps[1:], part="denoise")
    record = RunRecord("cpu", False, {}, None, None, [], [first, second], {}, {})
    assert record.step_seconds() == 3.0
    old = record.to_json()
    for stage in old["stages"]:
        del stage["part"]
    assert RunRecord.from_json(old).step_seconds() == 1.0


def test_the_json_has_no_other_keys_than_these() -> None:
    data = a_record().to_json()
    design = {
        "schema",
        "device",
        "config",
        "fits",
        "peak",
        "components",
        "stages",
        "fragmentation",
        "fluctuation",
        "host",
    }
    assert set(data) == design | {
        *("simulated", "budget_bytes", "environment", "failure", "notes", "times", "predicted", "attention", "videos"),
        *("resumed", "ranks"),
    }
    assert set(data["fragmentation"]) == {"at_peak", "stages"}
    assert set(data["host"]) == {"peak_rss_bytes", "pinned_bytes"}
    memory_keys = {
        f"{when}_{what}_bytes" for when in ("start", "peak", "end") for what in ("allocated", "reserved", "device")
    }
    stage_keys = memory_keys | {
        "name", "part", "kind", "component", "activation_bytes", "seconds", "host_rss_bytes", "pinned_bytes", "repeats", "videos",
        "notes", "children",
    }  # fmt: skip
    assert all(set(stage) == stage_keys for stage in (*data["stages"], *data["stages"][1]["children"]))


def test_of_stages_with_equal_peaks_the_first_is_the_peak_stage() -> None:
    same = Span("again", "stage", "vae", memory(0), memory(40, 50, 550), memory(0))
    record = a_record()
    record.stages.append(same)
    assert record.to_json()["peak"]["stage"] == "denoise"
    without_device = replace(record, stages=[step("low", peak=30), step("high", peak=40), step("equal", peak=40)])
    assert without_device.to_json()["peak"] == {
        "allocated_bytes": 40, "reserved_bytes": 40, "device_bytes": None, "stage": "high", "component": "dit",
    }  # fmt: skip


def test_the_peak_takes_each_figure_from_wherever_it_was_highest_and_the_stage_from_the_device() -> None:
    assert a_record().to_json()["peak"] == {
        "allocated_bytes": 40, "reserved_bytes": 60, "device_bytes": 550, "stage": "denoise", "component": "dit",
    }  # fmt: skip


def test_of_several_gpus_the_largest_peak_is_the_runs_and_each_has_its_own_figures() -> None:
    record = a_record()
    other = Span("denoise", "stage", "dit", memory(10), memory(70, 80, 600), memory(10, 50, 550), 9.0)
    lost = Failure("error", "rank 1 has ended", rank=1)
    ranks = [
        RankRecord((0,), "cuda:NVIDIA H200", record.stages, record.host),
        RankRecord((1, 2), "cuda:NVIDIA H200", [other], {}),
    ]
    several = replace(record, ranks=[ranks[0], replace(ranks[1], exchanged_bytes=5, failure=lost)])
    data = json.loads(json.dumps(several.to_json()))
    assert data["peak"]["device_bytes"] == 600
    assert data["stages"] == record.to_json()["stages"]
    assert [(rank["ranks"], rank["peak"]["device_bytes"]) for rank in data["ranks"]] == [([0], 550), ([1, 2], 600)]
    again = RunRecord.from_json(data)
    assert again.ranks[1] == several.ranks[1]
    assert json.loads(json.dumps(again.to_json())) == data
    data["ranks"][1]["failure"]["kind"] = "tired"
    with pytest.raises(InputError, match=r"failure\.kind"):
        RunRecord.from_json(data)
    assert (again.gpus, record.gpus) == (3, 1)
    assert [rank.name for rank in again.ranks] == ["0", "1-2"]
    assert replace(ranks[0], ranks=(1, 3)).name == "1, 3"
    with pytest.raises(InputError, match="an entry of no rank"):
        RunRecord.from_json(several.to_json() | {"ranks": [ranks[0].to_json() | {"ranks": []}]})


def test_the_time_of_a_step_is_the_median_whichever_stand_for_several() -> None:
    first, twice, last = (step("step 0", seconds=9.0), replace(step("step 1", seconds=2.0), repeats=2), step("step 3"))
    record = a_record()
    denoise = replace(record.stages[1], children=[first, twice, last])
    assert replace(record, stages=[denoise]).step_seconds() == 2.0
    assert replace(record, stages=[replace(denoise, children=[])]).step_seconds() is None


def test_fragmentation_is_the_reserved_share_that_no_tensor_uses() -> None:
    assert a_record().to_json()["fragmentation"] == {
        "at_peak": pytest.approx(0.2),
        "stages": {"load dit": 0.5, "denoise": pytest.approx(0.2), "decode": pytest.approx(25 / 60)},
    }


def test_fluctuation_is_the_spread_of_allocated_over_all_spans_inside() -> None:
    assert a_record().to_json()["fluctuation"] == {"load dit": 10, "denoise": 30, "decode": 25}


def test_a_stage_that_ran_twice_keeps_its_higher_figures() -> None:
    record = a_record()
    again = Span("denoise", "stage", "dit", memory(10), memory(99, 99), memory(10))
    record.stages.append(again)
    assert record.to_json()["fluctuation"]["denoise"] == 89
    record.stages.insert(0, record.stages.pop())
    assert record.to_json()["fluctuation"]["denoise"] == 89


def test_fifty_steps_of_which_49_are_the_same_are_stored_as_two() -> None:
    first, rest = a_record().to_json()["stages"][1]["children"]
    assert (first["name"], first["repeats"]) == ("step 0", 1)
    assert (rest["name"], rest["repeats"]) == ("step 1", 49)
    assert rest["seconds"] == pytest.approx(sum(range(1, 50)) / 49), (
        "the mean of one, so that repeats times it is the total"
    )
    assert rest["notes"] == ["the same memory through step 49"]


def test_folding_leaves_the_spans_it_was_given_alone_and_is_done_once() -> None:
    spans = [step("a"), step("b"), replace(step("c"), repeats=3), step("d", peak=31)]
    once = folded(spans)
    assert [(s.name, s.repeats) for s in once] == [("a", 5), ("d", 1)]
    assert [s.repeats for s in spans] == [1, 1, 3, 1]
    assert folded(once) == once


def test_spans_that_differ_only_deep_inside_are_not_folded() -> None:
    one, two = step("a"), step("b")
    one.children, two.children = [step("block 0", peak=20)], [step("block 0", peak=21)]
    assert len(folded([one, two])) == 2


def test_a_record_survives_json_and_a_file(tmp_path: Path) -> None:
    record = a_record()
    data = record.to_json()
    again = RunRecord.from_json(json.loads(json.dumps(data)))
    assert again.to_json() == data
    assert again.failure == record.failure
    record.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json").to_json() == data
    assert os.listdir(tmp_path) == ["record.json"], "no temporary file stays"


def test_a_record_without_stages_has_no_peak_stage() -> None:
    data = replace(a_record(), stages=[], failure=None).to_json()
    assert data["peak"]["stage"] is None
    assert data["peak"]["allocated_bytes"] == 0
    assert RunRecord.from_json(data).to_json() == data


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": 2}', '{"schema": 1}', "[" * 100_000, '{"schema": 1, "failure": 3}', "\udcff"]
)
def test_a_damaged_record_is_one_sentence_naming_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"record\.json"):
        RunRecord.read(path)


def test_a_missing_record_is_one_sentence_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json.*No such file"):
        RunRecord.read(tmp_path / "nowhere.json")


def test_a_full_disk_leaves_the_old_file_and_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"record\.json: No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_failing_rename_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def denied(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(OutputError, match=r"record\.json: Permission denied"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_folder_that_does_not_exist_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "record.json", "x")

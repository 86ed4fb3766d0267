"""What was measured cannot be made to look better: a changed prediction, a miss taken off the list, a worse prediction each show."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import evidence
import pytest
import sealed

BENCHMARKS = Path(evidence.__file__).parent


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Result files as they are committed, and their seals."""
    for path in BENCHMARKS.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_no_sealed_result_was_changed_or_removed() -> None:
    assert sealed.broken(BENCHMARKS) == []


def test_every_committed_result_of_before_is_sealed() -> None:
    """New files of a day are listed by `make evidence` until they are sealed, and break nothing."""
    seals = json.loads((BENCHMARKS / "seals.json").read_text())
    assert len(seals) >= 50
    assert "known_misses.json" in seals


def test_an_overwritten_prediction_shows(results: Path) -> None:
    path = results / "2026-11-24_h200_predict_vs_measure.json"
    document = json.loads(path.read_text())
    cell = document[0]["rows"][0]["allocated"]
    cell["predicted"] += 512
    path.write_text(json.dumps(document, indent=1) + "\n")
    (sentence,) = sealed.broken(results)
    assert path.name in sentence
    assert "is not what was sealed" in sentence


def test_a_miss_that_is_taken_off_the_list_shows(results: Path) -> None:
    path = results / "known_misses.json"
    document = json.loads(path.read_text())
    assert document["misses"], "today's code misses some"
    document["misses"].pop()
    path.write_text(json.dumps(document, indent=1) + "\n")
    assert [sentence.split()[0] for sentence in sealed.broken(results)] == ["known_misses.json"]


def test_a_result_that_is_removed_shows_and_a_new_one_is_only_listed(results: Path) -> None:
    (results / "2026-11-24_h200_fit_card.json").unlink()
    (results / "2027-01-01_h200_fit_card.json").write_text("{}")
    assert sealed.broken(results) == ["2026-11-24_h200_fit_card.json was sealed and is gone"]
    assert "2027-01-01_h200_fit_card.json" in sealed.unsealed(results)
    sealed.seal(results, [], "")
    assert sealed.unsealed(results) == []
    assert sealed.broken(results) == ["2026-11-24_h200_fit_card.json was sealed and is gone"]


def test_a_sealed_file_is_sealed_again_only_by_name_and_with_a_reason_that_stays(results: Path) -> None:
    name = "2026-11-24_h200_fit_card.json"
    was = json.loads((results / "seals.json").read_text())[name]["sha256"]
    (results / name).write_text("{}")
    sealed.seal(results, [], "")
    assert len(sealed.broken(results)) == 1, "sealing new files does not forgive a changed one"
    with pytest.raises(SystemExit, match="say why it changes"):
        sealed.seal(results, [name], "")
    sealed.seal(results, [name], "two cases were measured twice")
    assert sealed.broken(results) == []
    entry = json.loads((results / "seals.json").read_text())[name]
    assert entry["changed"] == [{"was": was, "because": "two cases were measured twice"}]


# --- predicted anew ----------------------------------------------------------------------------------------------------------


def a_case(measured: float, predicted: float, figure: str = "denoise allocated_bytes") -> evidence.Case:
    return evidence.Case("f.json", "a", {figure: measured}, partial(dict, {figure: predicted}))


def misses(case: evidence.Case) -> list[dict[str, Any]]:
    return case.misses(case.predict())


LOOKED = {("f.json", "a")}


@pytest.mark.parametrize(
    ("figure", "measured", "right", "wrong"),
    [
        ("denoise allocated_bytes", 1000, 1000, 1001),
        ("decode 2 reserved_bytes", 1000, 1000, 999),
        ("device_bytes", 1000, 1029, 1031),
        ("step_seconds", 1.0, 0.931, 0.929),
        ("decode_seconds", 1.0, 1.099, 1.101),
        ("command_seconds", 10.0, 11.4, 11.6),
        ("watched device_bytes", 10 << 30, (10 << 30) - (8 << 20), (10 << 30) - (9 << 20)),
        ("watched device_bytes", 1 << 30, int(1.004 * (1 << 30)), int(1.006 * (1 << 30))),
    ],
)
def test_each_figure_has_its_bound(figure: str, measured: float, right: float, wrong: float) -> None:
    assert misses(a_case(measured, right, figure)) == []
    assert [row["figure"] for row in misses(a_case(measured, wrong, figure))] == [figure]


def test_a_figure_that_is_no_longer_predicted_is_a_miss() -> None:
    case = evidence.Case("f.json", "a", {"step_seconds": 1.0}, partial(dict, {}))
    (row,) = misses(case)
    assert row["error"] is None
    assert evidence.judged([row], [], LOOKED) == [
        "a miss that is not in known_misses.json: f.json | a | step_seconds: measured 1, not predicted"
    ]


def test_a_new_miss_a_grown_one_and_one_that_is_no_more_are_each_said() -> None:
    small, large = misses(a_case(1000, 1010)), misses(a_case(1000, 1100))
    assert evidence.judged(small, small, LOOKED) == []
    assert "not in known_misses.json" in evidence.judged(small, [], LOOKED)[0]
    assert "grew from 0.01" in evidence.judged(large, small, LOOKED)[0]
    assert "no longer missed" in evidence.judged([], small, LOOKED)[0]
    assert evidence.judged([], small, set()) == [], "what was not looked at is not judged"


def test_a_real_measurement_is_predicted_anew_and_a_changed_digit_of_it_is_a_miss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "2026-11-30_h200_predict_vs_measure.json"
    document = json.loads((BENCHMARKS / name).read_text())
    runs = [run for run in document if run["config"] == "t2v-1.3B-832x480-81f-bf16-full-offload"]
    assert len(runs) == 1
    runs[0]["configuration"]["optimization"]["attention_backend"] = "fa4"  # what `auto` took there
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # which main sets, too, and which is taken back here
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    monkeypatch.setattr(evidence, "KNOWN", tmp_path / "known_misses.json")
    (tmp_path / "known_misses.json").write_text('{"reasons": {}, "misses": []}')
    (tmp_path / name).write_text(json.dumps(runs))
    sealed.seal(tmp_path, [], "")
    assert evidence.main(["--lanes", "1"]) == 0
    runs[0]["rows"][-1]["allocated"]["measured"] += 512
    (tmp_path / name).write_text(json.dumps(runs))
    assert evidence.main(["--lanes", "1"]) == 1
    said = capsys.readouterr().out
    assert "a miss that is not in known_misses.json" in said
    assert "is not what was sealed" in said


def test_every_kind_of_measurement_with_a_prediction_has_its_cases() -> None:
    found = {case.file for case in evidence.cases()}
    for pattern in evidence.KINDS:
        assert [name for name in found if Path(name).match(pattern)], pattern
    assert len(evidence.quick(evidence.cases())) < 40

"""Every benchmark can fail: a row at its bound is kept, one beyond it is a sentence and exit code 1."""

from __future__ import annotations

import ast
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import advice_saving
import beside_diffusers
import beside_diffusers_offload
import calibrate_clock
import convolution_kernels
import fit_card
import foreign_speed
import numerics
import overhead
import predict_vs_measure
import provenance
import pytest
import same_video
import tiled_vae

from wanvram.simulate.clock import PLAN_SECONDS
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.host import HOST

BENCHMARKS = Path(provenance.__file__).parent
# Tools that feed the simulator or others, and judge nothing.
TOOLS = {
    f"{name}.py"
    for name in (
        "fit_conv_workspaces",
        "harvest_conv_workspaces",
        "probe_libraries",
        "random_checkpoint",
        "compare_events",
    )
}


def test_every_script_hands_its_verdict_to_the_shell() -> None:
    silent = []
    for path in sorted(BENCHMARKS.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        mains = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        if mains and path.name not in TOOLS and "sys.exit(" not in path.read_text(encoding="utf-8"):
            silent.append(path.name)
    assert silent == []


def fit_row(**changes: Any) -> dict[str, Any]:
    case = json.loads((BENCHMARKS / "2026-11-24_h200_fit_card.json").read_text())["cases"][2]
    stages = [copy.deepcopy(stage) for stage in case["stages"]]
    for stage in stages:
        for quantity in ("allocated", "reserved", "device"):
            stage[quantity]["predicted"] = stage[quantity]["measured"]
    return case | {"stages": stages, "predicted_device_bytes": case["nvml_peak_bytes"]} | {
        "predicted_step_seconds": case["step_seconds"] * 1.06} | changes  # fmt: skip


def test_a_run_that_fits_its_card_keeps_every_bound() -> None:
    assert fit_card.breaches_of(fit_row()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nvml_peak_bytes": 2**33, "predicted_device_bytes": 2**33}, "MiB of the"),
        ({"failure": {"message": "no room"}}, "no room"),
        ({"predicted_step_seconds": 20.0}, "at most 7 % off".replace(" %", "%")),
        ({"resident_step_seconds": 1.0}, "times the resident one"),
        ({"predicted_device_bytes": 2**31}, "the card's memory"),
    ],
)
def test_a_run_beyond_one_bound_is_said(changes: dict[str, Any], said: str) -> None:
    assert any(said in breach for breach in fit_card.breaches_of(fit_row(**changes)))


def test_a_stage_that_is_predicted_wrong_and_a_process_that_died_are_said() -> None:
    row = fit_row()
    row["stages"][1]["allocated"]["predicted"] = int(row["stages"][1]["allocated"]["measured"] * 1.006)
    assert "at most 0.5%" in fit_card.breaches_of(row)[0]
    assert fit_card.breaches_of({"name": "a", "error": "first\nlast line\n"}) == ["a: died: last line"]


def test_a_tile_beyond_1_15_times_the_whole_is_said() -> None:
    rows = json.loads((BENCHMARKS / "2026-11-30_h200_tiled_vae.json").read_text())["rows"]
    assert len(tiled_vae.breaches_of(rows)) == 6, "as docs/evidence.md says of all tiles"


def test_advice_is_judged_by_memory_and_by_time() -> None:
    rows = json.loads((BENCHMARKS / "2026-11-25_h100_advice_saving.json").read_text())
    said = [breach for row in rows for breach in advice_saving.breaches_of(row)]
    assert any("--vae_tile 20" in breach and "measured" in breach for breach in said)
    assert any("--vae_precision bf16" in breach for breach in said)
    assert not any("predicted," in breach and "saved" in breach for breach in said), "memory was right in all"
    assert advice_saving.breaches_of({"name": "a", "change": "--b", "error": "it died"}) == ["a --b: it died"]


def test_recording_may_cost_no_step_time_and_no_memory() -> None:
    kept = {"on_against_off": {"step_time": 0.009, "step_time_kept": True, "peaks_kept": True}}
    assert overhead.breaches_of(kept) == []
    broken = {"on_against_off": {"step_time": 0.011, "step_time_kept": False, "peaks_kept": False}}
    assert len(overhead.breaches_of(broken)) == 2


@pytest.mark.parametrize("name", ["t2v-1.3B_bf16", "t2v-14B_bf16", "t2v-1.3B_fp32"])
def test_ways_that_are_equal_must_be_and_the_others_are_as_near_as_they_were(name: str) -> None:
    rows = json.loads((BENCHMARKS / f"2026-11-24_h200_same_video_{name}.json").read_text())["rows"]
    precision = name[-4:]
    assert [breach for row in rows for breach in same_video.breaches_of(row, precision)] == []
    changed = rows[0] | {"latents_equal": False, "frames_equal": False, "largest_latent_difference": 1.0}
    assert len(same_video.breaches_of(changed, precision)) == 1


def test_ours_may_not_be_further_from_float32_than_diffusers() -> None:
    row = {"model": "1.3B", "precision": "bf16", "ours": {"max": 1e-3, "rms": 1e-4}}
    row |= {"sliced": {"max": 1e-3, "rms": 1e-4}, "diffusers": {"max": 1e-3, "rms": 1e-4}}
    assert numerics.breaches_of(row) == []
    assert len(numerics.breaches_of(row | {"sliced": {"max": 2e-3, "rms": 2e-4}})) == 2
    assert numerics.breaches_of(row | {"precision": "fp32"}) != []


def test_a_comparison_says_where_diffusers_is_better() -> None:
    rows = json.loads((BENCHMARKS / "2026-11-24_beside_diffusers_1.3B.json").read_text())
    assert beside_diffusers.breaches_of(rows) == []
    faster = {"diffusers_dit_compiled": rows["diffusers_dit"] | {"seconds": 1.0}}
    assert beside_diffusers.breaches_of(rows | faster) == ["dit: seconds 1.036, diffusers 1.000"]
    assert len(beside_diffusers.breaches_of(rows | {"our_vae": {"error": "died"}})) == 1


def test_one_setting_that_is_faster_and_smaller_is_said() -> None:
    def part(name: str, seconds: float, nbytes: int) -> dict[str, Any]:
        return {"case": "c", "part": name, "expandable_segments": True, "seconds": seconds, "nvml_bytes": nbytes}

    ours = part("our_dit", 2.0, 200)
    judged = beside_diffusers_offload.breaches_of
    assert judged([ours, part("diffusers_dit_leaf", 1.0, 300), part("diffusers_dit_block", 3.0, 100)]) == []
    assert judged([ours, part("diffusers_dit_leaf_sync", 1.0, 100)]) != []
    assert judged([{"case": "c", "part": "our_dit", "expandable_segments": True, "error": "x"}]) == ["c/our_dit failed"]


def test_a_prediction_is_judged_stage_by_stage_and_a_run_that_stopped_is_seen() -> None:
    result = json.loads((BENCHMARKS / "2026-11-24_h200_predict_vs_measure.json").read_text())[0]
    assert predict_vs_measure.breaches_of(result) == []
    wrong = copy.deepcopy(result)
    wrong["rows"][0]["reserved"]["error"] = -0.0107
    assert "reserved -1.070%, at most 1.0%" in predict_vs_measure.breaches_of(wrong)[0]
    assert len(predict_vs_measure.breaches_of(result | {"failure": {"message": "oom"}, "unmeasured": ["decode"]})) == 2
    assert predict_vs_measure.breaches_of({"config": "a", "rows": [], "error": "died"}) == ["a: died"]


def test_the_clock_is_judged_on_files_that_it_was_not_fitted_on() -> None:
    fitted, held_out = (set(calibrate_clock.files(p)) for p in (calibrate_clock.FITTED, calibrate_clock.JUDGED))
    assert fitted
    assert len(held_out) >= 4
    assert not fitted & held_out
    measured = [calibrate_clock.Measured("h200", f"run {n}", {}, "step", 1.0, True) for n in range(3)]

    class Known(calibrate_clock.Predictions):
        def seconds(self, measured: Any) -> float:
            return {"run 0": 1.0, "run 1": 0.94, "run 2": 1.08}[measured.label]

    found = calibrate_clock.judged(measured, Known())
    assert found["breaches"] == ["h200 run 2: step +8.0%, at most 7%"]
    assert found["worst step"] == "+8.0% of 3, 2 within"


def test_a_fit_predicts_with_the_efficiency_that_it_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = GPUS["h200"]
    for key in ("h100", "h200"):
        monkeypatch.setitem(GPUS, key, GPUS[key])  # put back at the end
    config = copy.deepcopy(fit_card.CASES[0]["config"]) | {"optimization": {}}
    config["request"] |= {"weights": "tiny", "frame_num": 5, "sample_steps": 2}
    decode = calibrate_clock.Measured("h200", "tiny", config, "decode", 1.0, True)
    slow = replace(h200.efficiency, own_seconds=1.0, dispatch_seconds=1.0)
    assert (calibrate_clock.Predictions().seconds(decode) or 0) < 1
    assert (calibrate_clock.Predictions().with_efficiency(slow).seconds(decode) or 0) > 10


def test_a_warm_decode_loads_no_library_and_makes_no_plan() -> None:
    config = copy.deepcopy(fit_card.CASES[0]["config"]) | {"optimization": {}}
    config["request"] |= {"weights": "tiny", "frame_num": 5, "sample_steps": 2}
    cold, warm = (calibrate_clock.Measured("h200", "tiny", config, "decode", 1.0, warm) for warm in (False, True))
    predictions = calibrate_clock.Predictions()
    spared = (predictions.seconds(cold) or 0) - (predictions.seconds(warm) or 0)
    assert spared > HOST.first_use["cudnn"].warm + 10 * PLAN_SECONDS


def test_a_second_result_of_a_day_is_written_beside_the_first(tmp_path: Path) -> None:
    path = tmp_path / "2026-11-29_h200_x.json"
    path.write_text("{}")
    taken = [provenance.unused(path).name for _ in range(2)]  # neither has written when the other asks
    assert taken == ["2026-11-29_h200_x_2.json", "2026-11-29_h200_x_3.json"]
    assert path.read_text() == "{}"
    for name in taken:
        provenance._drop_if_empty(path.with_name(name))
    provenance._drop_if_empty(path)
    assert [other.name for other in tmp_path.iterdir()] == [path.name], "what a script that died had reserved is gone"


@pytest.mark.parametrize(("us", "ram", "code"), [(60.0, 3 * 2**29, 0), (60.1, 3 * 2**29, 1), (60.0, 3 * 2**29 + 1, 1)])
def test_a_simulation_over_a_bound_of_time_or_ram_fails_and_its_result_stands_beside_the_first(
    us: float, ram: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_speed, "measured", lambda make: {"seconds": 1.0, "us_per_operation": us})
    estimate = {"seconds": 9.0, "peak_ram_bytes": ram, "most_peak_ram_bytes": foreign_speed.MOST_RAM_BYTES}
    monkeypatch.setattr(foreign_speed, "estimated", lambda: estimate)
    monkeypatch.setattr("sys.argv", ["foreign_speed.py", "--out", str(tmp_path)])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            foreign_speed.main()
        assert ended.value.code == code
    first, second = sorted(tmp_path.iterdir(), key=lambda path: len(path.name))
    assert second.name == f"{first.stem}_2.json"


def test_a_result_says_when_where_and_of_what_code_it_is() -> None:
    found = provenance.header("fit_card.py")
    assert {"date", "gpu", "commit", "source_sha256", "torch", "python", "cpu_count", "ram_bytes"} <= set(found)


def test_the_vae_s_choice_of_convolutions_is_judged_by_time_and_error() -> None:
    rows = json.loads((BENCHMARKS / "2026-11-29_h200_convolution_kernels.json").read_text())["rows"]
    assert convolution_kernels.breaches_of(rows) == []
    slow, wrong = (
        [row | change if row["form"] == "picture" else row for row in rows] for change in ({"ms": 9.0}, {"rms": 1.0})
    )
    shapes = len(convolution_kernels.SHAPES)
    assert len(convolution_kernels.breaches_of(slow)) == len(convolution_kernels.breaches_of(wrong)) == shapes

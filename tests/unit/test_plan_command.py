"""`wanvram plan` as a user meets it: the text, the JSON, the configuration it writes, exit codes. Forecasts are made by hand."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from planner_card import Card, plan
from wanvram.cli import generate
from wanvram.cli import main as command
from wanvram.cli import plan as verb
from wanvram.config import Request, RunConfig, Strategy, load_config
from wanvram.errors import BudgetError, DeviceError, WanvramError
from wanvram.planner.budget import Budget
from wanvram.planner.result import Offer, Plan, Rejected
from wanvram.planner.search import Options
from wanvram.record import Failure, Memory
from wanvram.report.plan import flags_of, summarize_plan
from wanvram.run.planning import plan_run
from wanvram.units import GIB

REQUEST = Request.for_task("t2v-14B", size="1280*720")
T2V = ["plan", "--task", "t2v-14B", "--size", "1280*720"]


def free_memory_of(name: str, nbytes: int) -> ModuleType:
    module = ModuleType("wanvram.run.environment")
    module.free_device_bytes = lambda: (nbytes, 2 * nbytes, name)  # type: ignore[attr-defined]
    return module


class WholeRun:
    """The simulation of what was chosen: it confirms the forecasts."""

    failure: Failure | None = None

    def peak(self) -> Memory:
        return Memory(0, 0, 0)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """The only verb is plan, and it simulates on a card made by hand."""
    card = Card()
    monkeypatch.setattr("wanvram.run.planning.simulate_stage", card)
    monkeypatch.setattr("wanvram.run.planning.simulate", lambda config, **how: (WholeRun(), None))
    monkeypatch.setattr(command, "VERBS", (verb,))
    return card


def test_a_plan_that_fits_says_memory_time_strategy_stages_and_why_not_faster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main([*T2V, "--vram", "6GiB", "--ram", "64GiB", "--precision", "bf16"]) == 0
    text = capsys.readouterr().out
    assert "t2v-14B 1280*720 81 frames, 50 steps, predicted for NVIDIA H200" in text
    assert "Fits in 6.00 GiB: device memory 5." in text
    assert "per step" in text
    assert "--precision bf16 --load_strategy block --offload_model True" in text
    assert [f"\n{name} " in text for name in ("text_encoder", "dit", "vae_decoder")] == [True] * 3
    assert "dit: load_strategy full" in text
    assert "vae_decoder: vae_tile none (whole frames) needs" in text
    assert "--weight_storage fp8: " in text
    assert "of 64.00 GiB" in text


def test_json_is_one_document_with_the_figures_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*T2V, "--vram", "6GiB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is True
    assert document["peak_device_bytes"] + document["budget"]["margin_bytes"] <= 6 * GIB
    assert document["changed"]["load_strategy"] == "block"
    assert [stage["component"] for stage in document["stages"]] == ["text_encoder", "dit", "vae_decoder"]
    assert document["seconds"] == pytest.approx(sum(stage["total_seconds"] for stage in document["stages"]))
    assert {tuple(o["change"]) for o in document["lossy"]} == {("weight_storage",), ("vae_precision",)}


def test_the_written_configuration_is_the_plan_under_a_hard_cap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.yaml"
    assert command.main([*T2V, "--vram", "6GiB", "--sample_steps", "7", "-o", str(path), "--ckpt_dir", "ckpt"]) == 0
    assert f"Wrote {path}" in capsys.readouterr().out
    config = load_config(path)
    direct = plan(config.request, Budget(6 * GIB), Options(config.strategy), Card())
    assert config.strategy == direct.strategy
    assert (config.memory_limit_bytes, config.weights, config.device) == (6 * GIB, "ckpt", "auto")
    assert config.request.sample_steps == 7


def test_a_file_is_not_replaced_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str], card: Card) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("mine")
    assert command.main([*T2V, "--vram", "6GiB", "-o", str(path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (path.read_text(), card.calls) == ("mine", [])
    assert command.main([*T2V, "--vram", "6GiB", "-o", str(path), "--force"]) == 0
    assert load_config(path).strategy.load_strategy == "block"


def test_nothing_fits_is_exit_code_3_and_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    assert command.main([*T2V, "--vram", "4GiB", "-o", str(path)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "does not fit 4.00 GiB: the dit needs a budget of" in err
    assert "--size 832*480" in err
    assert not path.exists()


def test_nothing_fits_in_json_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*T2V, "--vram", "4GiB", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is False
    assert (document["memory"], document["component"]) == ("device", "dit")
    assert document["smallest_bytes"] > 4 * GIB
    assert document["alternatives"][0]["size"] == "832*480"


@pytest.mark.parametrize(
    "flags", [["--vram", "much"], ["--vram", "8GiB", "--ram", "1GiB"], ["--vram", "8GiB", "--gpu", "x"]]
)
def test_a_wrong_amount_or_card_is_exit_code_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*T2V, *flags]) == 2
    assert capsys.readouterr().err.startswith("wanvram: ")


def test_auto_takes_what_the_card_has_free(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wanvram.run.environment", free_memory_of("NVIDIA GeForce RTX 4090", 20 * GIB))
    assert command.main([*T2V, "--vram", "auto", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["budget"]["gpu"], document["budget"]["vram_bytes"]) == ("rtx4090", 20 * GIB)
    assert any("not measured" in note for note in document["notes"])


def test_auto_without_a_gpu_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_gpu() -> tuple[int, int, str]:
        raise DeviceError("no CUDA device")

    module = free_memory_of("", 1)
    module.free_device_bytes = no_gpu  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wanvram.run.environment", module)
    assert command.main([*T2V, "--vram", "auto"]) == 1
    assert capsys.readouterr().err == "wanvram: no CUDA device\n"


def test_progress_names_every_forecast(capsys: pytest.CaptureFixture[str], card: Card) -> None:
    assert command.main([*T2V, "--vram", "6GiB"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(card.calls)
    assert any("dit: " in line and "GiB" in line for line in lines)


def test_a_whole_run_above_its_forecasts_is_planned_again_with_that_much_more_kept_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = iter([6 * GIB + 100, 4 * GIB])

    class Higher(WholeRun):
        def peak(self) -> Memory:
            return Memory(0, 0, next(peaks))

    monkeypatch.setattr("wanvram.run.planning.simulate", lambda config, **how: (Higher(), None))
    config = RunConfig("x", "", "simulated", REQUEST, Strategy(load_strategy="block"))
    result, _ = plan_run(config, Budget(6 * GIB), offers=False)
    assert isinstance(result, Plan)
    assert result.budget == Budget(6 * GIB)
    assert result.peak_device_bytes == 4 * GIB
    assert max(stage.peak_device_bytes for stage in result.stages) <= 2 * Budget(6 * GIB).device_limit - 6 * GIB - 100


@pytest.mark.parametrize(("platform", "used"), [("linux", True), ("win32", False)])
def test_expandable_segments_are_planned_where_pytorch_has_them(
    monkeypatch: pytest.MonkeyPatch, platform: str, used: bool
) -> None:
    monkeypatch.setattr("wanvram.run.planning.sys.platform", platform)
    config = RunConfig("x", "", "simulated", REQUEST, Strategy(load_strategy="block"))
    result, _ = plan_run(config, Budget(12 * GIB), offers=False)
    assert isinstance(result, Plan)
    assert result.strategy.expandable_segments is used


def test_a_plan_that_never_keeps_its_budget_when_simulated_whole_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class Higher(WholeRun):
        def peak(self) -> Memory:
            return Memory(0, 0, 7 * GIB)

    monkeypatch.setattr("wanvram.run.planning.simulate", lambda config, **how: (Higher(), None))
    config = RunConfig("x", "", "simulated", Request.for_task("t2v-1.3B", size="832*480"), Strategy())
    with pytest.raises(BudgetError, match=r"3 plans for 6\.00 GiB needed more"):
        plan_run(config, Budget(6 * GIB), offers=False)


def test_a_whole_run_is_simulated_without_the_card_s_end_and_one_that_stops_early_is_no_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stopped(WholeRun):
        failure = Failure("oom", "there was no room")

    asked: list[dict[str, bool]] = []

    def simulate(_config: RunConfig, **how: bool) -> tuple[Stopped, None]:
        asked.append(how)
        return Stopped(), None

    monkeypatch.setattr("wanvram.run.planning.simulate", simulate)
    config = RunConfig("x", "", "simulated", REQUEST, Strategy())
    with pytest.raises(WanvramError, match="could not be simulated to its end: there was no room"):
        plan_run(config, Budget(6 * GIB), offers=False)
    assert asked == [{"unlimited": True}]


def made_by_hand() -> Plan:
    result = plan(REQUEST, Budget(80 * GIB, ram_bytes=64 * GIB), Options(offers=False), Card(timed=False))
    rejected = (
        Rejected("dit", {"rows_per_chunk": None}, "device", 9 * GIB, 8 * GIB, 12.5),
        Rejected("dit", {"weights_in": "pinned"}, "host", 40 * GIB, 30 * GIB, None),
    )
    offers = (Offer("dit", {"weight_storage": "fp8"}, 13 * GIB, 0, -GIB, -2.0),)
    return Plan(result.request, result.budget, result.strategy, result.stages, rejected, offers, ("a note",))


def test_unknown_times_are_dashes_and_costs_are_not_called_savings() -> None:
    text = summarize_plan(made_by_hand())
    assert "Time: unknown per step, unknown in all" in text
    assert (
        "dit: rows_per_chunk chosen by size needs 9.00 GiB of device memory, 8.00 GiB allowed; would save 12.5 s"
        in text
    )
    assert (
        "dit: weights_in pinned needs 40.00 GiB of host RAM for weights, 30.00 GiB allowed; time gained unknown" in text
    )
    offer = next(line for line in text.splitlines() if "--weight_storage fp8" in line)
    assert offer.strip() == (
        "--weight_storage fp8: 13.00 GiB less of device memory of the dit, 1.00 GiB more of host RAM, costs 2.00 s"
    )
    assert text.endswith("note: a note\n")


def test_the_flags_are_those_that_generate_takes() -> None:
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    result = plan(REQUEST, Budget(6 * GIB), Options(offers=False), Card())
    args = vars(parser.parse_args(flags_of(result).split()))
    names = {field.name for field in fields(Strategy)}
    assert Strategy(**{k: v for k, v in args.items() if k in names and v is not None}) == result.strategy

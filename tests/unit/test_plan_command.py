"""`wanvram plan` as a user meets it: the text, the JSON, the configuration it writes, exit codes. Forecasts are made by hand."""

from __future__ import annotations

import json
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from planner_card import Card, plan
from wanvram.cli import generate
from wanvram.cli import main as command
from wanvram.cli.budget import planned
from wanvram.cli.flags import config_from_flags
from wanvram.cli.processes import for_all
from wanvram.config import Request, RunConfig, Strategy, load_config
from wanvram.errors import BudgetError, DeviceError, InputError, WanvramError
from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import stage_seconds
from wanvram.planner.result import Offer, Plan, Rejected, Trade
from wanvram.planner.search import Options
from wanvram.predict.plan import plan_run
from wanvram.record import Failure, Times
from wanvram.report.plan import summarize_plan
from wanvram.spans import Memory, Span
from wanvram.units import GIB, MIB

REQUEST = Request.for_task("t2v-14B", size="1280*720")
HERE = ["plan", "--task", "t2v-14B", "--size", "1280*720"]
T2V = [*HERE, "--gpu", "h200"]


def free_memory_of(name: str, nbytes: int) -> Callable[[], SimpleNamespace]:
    return lambda: SimpleNamespace(name=name, memory=lambda: (nbytes, 2 * nbytes))


def no_card() -> None:
    raise DeviceError("no CUDA device")


class WholeRun:
    """The simulation of what was chosen: it confirms the forecasts."""

    failure: Failure | None = None
    stages: tuple[Span, ...] = ()
    times = Times()

    def all_stages(self) -> tuple[Span, ...]:
        return self.stages

    def prediction(self, elapsed_seconds: float) -> None:
        return None

    def step_seconds(self) -> float | None:
        return None

    def peak(self) -> Memory:
        return Memory(0, 0, 0)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """The only verb is plan, it simulates on a card made by hand, and this machine has no card and 64 GiB of RAM."""
    card = Card()
    monkeypatch.setattr("wanvram.predict.plan.simulate_stage", card)
    monkeypatch.setattr("wanvram.predict.plan.simulate", lambda config, **how: (WholeRun(), None))
    monkeypatch.setattr(command, "VERBS", ("plan",))
    monkeypatch.setattr("wanvram.cli.budget.first_gpu", no_card)
    monkeypatch.setattr("wanvram.machine.host.total_ram_bytes", lambda: 64 * GIB)
    monkeypatch.setattr("wanvram.machine.host.available_ram_bytes", lambda: 40 * GIB)
    return card


def test_a_plan_that_fits_says_memory_time_strategy_stages_and_why_not_faster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main([*T2V, "--vram", "6GiB", "--ram", "64GiB", "--precision", "bf16"]) == 0
    text = capsys.readouterr().out
    assert "t2v-14B 1280*720 81 frames, 50 steps, predicted for NVIDIA H200" in text
    assert "Fits in 6.00 GiB: device memory 6,0" in text
    assert "per step" in text
    assert "--precision bf16 --load_strategy block --offload_model True" in text
    assert [f"\n{name} " in text for name in ("text_encoder", "dit", "vae_decoder")] == [True] * 3
    assert "dit: load_strategy full" in text
    assert "vae_decoder: vae_tile none (whole frames) needs" in text
    assert "--weight_storage fp8: " in text
    assert "of 64.00 GiB, 8.00 GiB kept for the system" in text


def test_json_is_one_document_with_the_figures_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*T2V, "--vram", "6GiB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is True
    assert document["peak_device_bytes"] + document["budget"]["margin_bytes"] <= 6 * GIB
    assert document["changed"]["load_strategy"] == "block"
    assert [stage["component"] for stage in document["stages"]] == ["text_encoder", "dit", "vae_decoder"]
    assert document["command"].startswith("wanvram generate --task t2v-14B")
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
    assert command.main([*T2V, "--vram", "3.4GiB", "-o", str(path)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "does not fit 3,481.6 MiB: the dit needs a budget of" in err
    assert "--size 832*480" in err
    assert not path.exists()


def test_nothing_fits_in_json_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*T2V, "--vram", "3.4GiB", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is False
    assert (document["memory"], document["component"]) == ("device", "dit")
    assert document["smallest_bytes"] > 3.4 * GIB
    assert document["alternatives"][0]["size"] == "832*480"


@pytest.mark.parametrize(
    "flags", [["--vram", "much"], ["--vram", "8GiB", "--ram", "6GiB"], ["--vram", "8GiB", "--gpu", "x"]]
)
def test_a_wrong_amount_or_card_is_exit_code_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*T2V, *flags]) == 2
    assert capsys.readouterr().err.startswith("wanvram: ")


def test_auto_takes_what_the_card_has_free(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("wanvram.cli.budget.first_gpu", free_memory_of("NVIDIA GeForce RTX 4090", 20 * GIB))
    assert command.main([*HERE, "--vram", "auto", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["budget"]["gpu"], document["budget"]["vram_bytes"]) == ("rtx4090", 20 * GIB)
    assert any("not measured" in note for note in document["notes"])


def test_auto_without_a_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*T2V, "--vram", "auto"]) == 1
    assert capsys.readouterr().err == "wanvram: no CUDA device\n"


def test_progress_of_a_search_says_how_many_forecasts_are_done_and_what_is_left(
    capsys: pytest.CaptureFixture[str], card: Card
) -> None:
    assert command.main([*T2V, "--vram", "6GiB"]) == 0
    lines = capsys.readouterr().err.splitlines()
    forecasts = [line for line in lines if "] forecast " in line]
    assert len(forecasts) == len(card.calls)
    assert "forecast 1: vae_decoder 8," in forecasts[0]
    assert forecasts[0].endswith(" s left")
    assert "about 9 more" in forecasts[0]
    assert [line.partition("] ")[2] for line in lines if line not in forecasts] == ["simulating the whole run"]


def test_a_whole_run_above_its_forecasts_is_planned_again_with_that_much_more_kept_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = iter([6 * GIB + 100, 4 * GIB])

    class Higher(WholeRun):
        def peak(self) -> Memory:
            return Memory(0, 0, next(peaks))

    monkeypatch.setattr("wanvram.predict.plan.simulate", lambda config, **how: (Higher(), None))
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
    monkeypatch.setattr("sys.platform", platform)
    config = RunConfig("x", "", "simulated", REQUEST, Strategy(load_strategy="block"))
    result, _ = plan_run(config, Budget(12 * GIB), offers=False)
    assert isinstance(result, Plan)
    assert result.strategy.expandable_segments is used


def test_a_plan_that_never_keeps_its_budget_when_simulated_whole_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class Higher(WholeRun):
        needed = 7 * GIB

        def peak(self) -> Memory:
            return Memory(0, 0, self.needed)

    monkeypatch.setattr("wanvram.predict.plan.simulate", lambda config, **how: (Higher(), None))
    config = RunConfig("x", "", "simulated", Request.for_task("t2v-1.3B", size="832*480"), Strategy())
    with pytest.raises(BudgetError, match=r"plans? for 6\.00 GiB needed more .* the last 1,116\.2 MiB above"):
        plan_run(config, Budget(6 * GIB), offers=False)
    Higher.needed = 6 * GIB
    with pytest.raises(
        BudgetError, match=r"3 plans for 6\.00 GiB needed more when simulated whole, the last 92\.2 MiB above"
    ):
        plan_run(config, Budget(6 * GIB), offers=False)


def test_a_whole_run_that_stops_under_its_cap_is_simulated_without_one_and_is_no_plan_if_it_stops_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stopped(WholeRun):
        failure = Failure("oom", "there was no room")

    asked: list[dict[str, bool]] = []

    def simulate(_config: RunConfig, **how: bool) -> tuple[Stopped, None]:
        asked.append(how)
        return Stopped(), None

    monkeypatch.setattr("wanvram.predict.plan.simulate", simulate)
    config = RunConfig("x", "", "simulated", REQUEST, Strategy())
    with pytest.raises(WanvramError, match="could not be simulated to its end: there was no room"):
        plan_run(config, Budget(6 * GIB), offers=False)
    assert asked == [{"video": True}, {"unlimited": True, "video": True}]


def made_by_hand() -> Plan:
    result = plan(REQUEST, Budget(80 * GIB, ram_bytes=64 * GIB), Options(offers=False), Card(timed=False))
    rejected = (
        Rejected("dit", {"rows_per_chunk": None}, "device", 9 * GIB, 8 * GIB, 12.5),
        Rejected("dit", {"weights_in": "pinned"}, "host", 40 * GIB, 30 * GIB, None),
    )
    offers = (Offer("dit", {"weight_storage": "fp8"}, 13 * GIB, 0, -GIB, -2.0),)
    trades = (Trade({"weights_in": "pinned"}, 2.0, 26 * GIB, 0), Trade({"vae_tile": None}, 0.01, 0, GIB))
    return replace(result, rejected=rejected, trades=trades, offers=offers, notes=("a note",))


def test_unknown_times_are_dashes_and_costs_are_not_called_savings() -> None:
    text = summarize_plan(made_by_hand(), "wanvram generate")
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
    assert "  would be 2.00 s faster with 26.00 GiB more of host RAM: weights_in pinned\n" in text
    assert "vae_tile none" not in text, "a hundredth of a second is not worth a word"
    assert text.endswith("note: a note\n")


# --- the card, its memory and the RAM ----------------------------------------------------------------------------------------


def document_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert command.main([*flags, "--json"]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_without_gpu_the_card_of_this_machine_and_its_ram_are_planned_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wanvram.cli.budget.first_gpu", free_memory_of("NVIDIA GeForce RTX 4090", 20 * GIB))
    budget = document_of(capsys, *HERE, "--vram", "12GiB")["budget"]
    assert isinstance(budget, dict)
    assert (budget["gpu"], budget["vram_bytes"]) == ("rtx4090", 12 * GIB)
    assert (budget["ram_bytes"], budget["ram_kept_bytes"]) == (64 * GIB, 8 * GIB)
    free = document_of(capsys, *HERE)
    assert free["budget"]["vram_bytes"] == 20 * GIB  # type: ignore[index]
    assert free["budget"]["ram_kept_bytes"] == 24 * GIB, "what is in use now is not ours"  # type: ignore[index]
    assert "20.00 GiB of the 40.00 GiB of the NVIDIA GeForce RTX 4090 are free now" in str(free["notes"])
    other = document_of(capsys, *HERE, "--vram", "6GiB", "--gpu", "rtx4060")["budget"]
    assert other["ram_bytes"] is None, "another machine's"  # type: ignore[index]


def test_without_a_card_one_must_be_named_and_those_with_that_much_memory_are_listed(
    capsys: pytest.CaptureFixture[str], card: Card
) -> None:
    assert command.main([*HERE, "--vram", "8GiB"]) == 2
    said = capsys.readouterr().err
    assert "name it with --gpu (cards with 8.00 GiB: " in said
    assert "rtx4060, " in said
    assert command.main(HERE) == 2
    assert "`wanvram check --cards` lists them" in capsys.readouterr().err
    assert card.calls == []


def test_gpu_alone_plans_for_that_card_less_a_desktop_s_share(capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of(capsys, *HERE, "--gpu", "rtx4090")
    budget = document["budget"]
    assert budget["usable_bytes"] == budget["vram_bytes"] == int(24 * GIB * 0.98) - GIB  # type: ignore[index]
    assert "1.00 GiB are left to others, as to a desktop" in str(document["notes"])


def test_what_is_stated_counts_beyond_the_card_s_name(capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of(capsys, *HERE, "--gpu", "rtx4090", "--vram", "48GB")
    assert document["budget"]["usable_bytes"] == 48 * GIB  # type: ignore[index]
    assert "known with 23.52 GiB; the 48.00 GiB that were stated count" in str(document["notes"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vram", "8"], "--vram: 8 what? write 8GiB"),
        (["--vram", "8GiB", "--ram", "32"], "--ram: 32 what? write 32GiB"),
    ],
)
def test_a_bare_small_number_is_refused_at_once(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str], card: Card
) -> None:
    assert command.main([*T2V, *flags]) == 2
    assert capsys.readouterr().err == f"wanvram: {sentence}\n"
    assert card.calls == []


@pytest.mark.parametrize("device", ["auto", "simulated"])
def test_a_vram_budget_needs_a_card_or_its_name_unless_the_run_is_simulated(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    args = parser.parse_args(["--task", "t2v-14B", "--weights", "random", "--vram_budget", "8GiB", "--device", device])
    config = config_from_flags(args, device=device, weights="random", gpu=None, memory_limit_bytes=None)
    if device == "auto":
        with pytest.raises(InputError, match="name it with --gpu"):
            planned(config, args)
        return
    ready, _ = planned(config, args)
    assert (ready.gpu, ready.memory_limit_bytes) == ("h200", 8 * GIB)
    assert "planned for the NVIDIA H200, the card that is simulated where --gpu names none" in capsys.readouterr().err


# --- several GPUs ------------------------------------------------------------------------------------------------------------


def test_a_plan_for_two_gpus_says_how_they_share_and_what_joins_them(
    capsys: pytest.CaptureFixture[str], card: Card
) -> None:
    asked = ["plan", "--task", "t2v-14B", "--size", "480p", "--gpu", "rtx4090", "--vram", "12GiB", "--gpus", "2"]
    assert command.main([*asked, "--link", "pcie4"]) == 0
    text = capsys.readouterr().out
    assert "predicted for 2 x NVIDIA GeForce RTX 4090, joined by pcie4" in text
    assert "Fits in 12.00 GiB of each" in text
    assert "ways in which 2 GPUs can share it, by forecasts of the transformer alone:" in text
    assert "--cfg_size 2 --gpus 2" in next(line for line in text.splitlines() if "wanvram generate" in line)
    assert all(config.link == "pcie4" for config in card.configs)
    assert command.main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["budget"]["gpus"] == 2
    assert [layout["verdict"] for layout in document["layouts"]].count("chosen") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "2", "--link", "nvlink"], "the NVIDIA GeForce RTX 4090 has no NVLink"),
        (["--gpus", "4", "--ulysses_size", "2"], "together are of another number"),
        (["--gpus", "0"], "must be at least 1"),
    ],
)
def test_gpus_that_contradict_their_sizes_or_cards_end_with_2(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["plan", "--task", "t2v-14B", "--gpu", "rtx4090", "--vram", "12GiB", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sizes"), [([], (2, 1)), (["--ulysses_size", "2"], (1, 2)), (["--sample_guide_scale", "1"], (1, 2))]
)
def test_a_vram_budget_of_several_gpus_chooses_how_they_share_unless_that_was_said(
    flags: list[str], sizes: tuple[int, int]
) -> None:
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    words = ["--task", "t2v-14B", "--weights", "random", "--vram_budget", "60GiB", "--device", "simulated"]
    args = parser.parse_args([*words, "--gpus", "2", *flags])
    config = config_from_flags(args, device="simulated", weights="random", gpu=None, memory_limit_bytes=None)
    ready, _ = planned(for_all(config), args)
    assert (ready.strategy.cfg_size, ready.strategy.ulysses_size) == sizes
    assert ready.gpus == 2


# --- the command to copy -----------------------------------------------------------------------------------------------------


def test_the_whole_command_is_printed_and_means_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--task", "i2v-14B", "--size", "480p", "--gpu", "rtx4060", "--vram", "6GiB", "--precision", "bf16"]
    asked += ["--image", "my cat.jpg", "--prompt", "the cat's jump", "--sample_steps", "7", "--sample_shift", "4"]
    asked += ["--base_seed", "5", "--sample_solver", "dpm++", "--ckpt_dir", "wan"]
    path = tmp_path / "plan.yaml"
    assert command.main([*asked, "-o", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = shlex.split(lines[lines.index("run it with:") + 1])
    assert words[:2] == ["wanvram", "generate"]
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    args = parser.parse_args(words[2:])
    config = config_from_flags(args, device=None, weights=args.weights, gpu=None, memory_limit_bytes=6 * GIB)
    written = load_config(path)
    assert (args.vram, config.request, config.strategy) == ("6GiB", written.request, written.strategy)
    assert config.weights == "wan"


def test_the_remedy_is_the_same_request(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--precision", "bf16", "--sample_steps", "7", "--prompt", "it's", "--ram", "64GiB"]
    assert command.main([*T2V, "--vram", "3.4GiB", *asked]) == 3
    remedies = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  wanvram plan ")]
    assert len(remedies) == 2
    for remedy in remedies:
        words = shlex.split(remedy)[1:]
        pairs = dict(zip(words[1::2], words[2::2], strict=True))
        assert pairs["--prompt"] == "it's"
        assert (pairs["--precision"], pairs["--sample_steps"], pairs["--ram"]) == ("bf16", "7", "64GiB")
        assert command.main([*words, "--json"]) == 0


# --- the longest -------------------------------------------------------------------------------------------------------------


def test_the_most_frames_that_fit_are_one_command_for_several_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--longest", "--task", "t2v-14B", "--size", "480p,720p", "--gpu", "h200", "--vram", "6GiB"]
    assert command.main(asked) == 0
    text = capsys.readouterr().out
    assert "the most frames that fit 6.00 GiB of NVIDIA H200" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("  wanvram")] == [
        ["wanvram", "generate"]
    ] * 2
    rows = document_of(capsys, *asked)["longest"]
    assert isinstance(rows, list)
    assert [row["size"] for row in rows] == ["832*480", "1280*720"]
    frames = [row["frame_num"] for row in rows]
    assert frames[0] > frames[1] > 5
    assert all(row["plan"]["seconds"] > 0 for row in rows)
    at_once = ["plan", "--task", "t2v-14B", "--size", "720p", "--gpu", "h200", "--vram", "6GiB", "--frame_num"]
    assert command.main([*at_once, str(frames[1])]) == 0
    assert command.main([*at_once, str(frames[1] + 4)]) == 3


def test_no_frames_that_fit_are_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--longest", "--task", "t2v-14B", "--size", "480p,720p", "--gpu", "h200", "--vram", "1.5GiB"]
    assert command.main(asked) == 3
    assert capsys.readouterr().err.splitlines()[-1] == (
        "wanvram: t2v-14B fits 1.50 GiB at none of these sizes, however short"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--frame_num", "81"], "leave --frame_num and -o out"),
        (["--task", "t2i-14B"], "makes one picture"),
        (["--size", "480p,8k"], "'8k' is not supported"),
    ],
)
def test_what_makes_no_sense_with_the_longest_is_refused(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["plan", "--longest", "--gpu", "h200", "--vram", "6GiB", *flags]) == 2
    assert sentence in capsys.readouterr().err


# --- the same figure ---------------------------------------------------------------------------------------------------------


def span(name: str, component: str, seconds: float | None, peak: int, *, kind: str = "stage") -> Span:
    start, high = Memory(10 * MIB, 20 * MIB, 30 * MIB), Memory(peak * MIB, peak * MIB, peak * MIB)
    return Span(name, kind, component, start, high, Memory(50 * MIB, 60 * MIB, 70 * MIB), seconds=seconds)


@dataclass
class Recorded(WholeRun):
    times = Times(5.0, 170.0)

    def __post_init__(self) -> None:
        denoise = replace(
            span("denoise", "dit", 100.0, 4000), children=[replace(span("step 0", "dit", 2.0, 4000), repeats=50)]
        )
        self.stages = (
            span("load text_encoder", "text_encoder", 3.0, 900, kind="load"),
            span("encode_text", "text_encoder", 1.0, 1000),
            span("load dit", "dit", None, 2000, kind="load"),
            span("prepare", "dit", 0.5, 2000),
            denoise,
            span("load vae", "vae", None, 300, kind="load"),
            span("decode", "vae", 58.6, 3000),
        )

    def step_seconds(self) -> float | None:
        return 2.0

    def peak(self) -> Memory:
        return Memory(4000 * MIB, 4000 * MIB, 4000 * MIB)


def test_the_plan_says_what_estimate_says_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanvram.predict.plan.simulate", lambda config, **how: (Recorded(), None))
    result, _ = plan_run(RunConfig("x", "", "simulated", REQUEST, Strategy()), Budget(6 * GIB), offers=False)
    assert isinstance(result, Plan)
    assert [(s.component, s.peak_device_bytes // MIB) for s in result.stages] == [
        ("text_encoder", 1000),
        ("dit", 4000),
        ("vae_decoder", 3000),
    ]
    spent = sum(stage_seconds(REQUEST, stage) or 0.0 for stage in result.stages)
    assert spent == pytest.approx(3.0 + 1.0 + 0.5 + 100.0 + 58.6)
    assert result.seconds == 170.0
    assert (result.seconds_per_step, result.peak_device_bytes) == (2.0, 4000 * MIB)
    assert result.stages[2].base_bytes == 40 * MIB

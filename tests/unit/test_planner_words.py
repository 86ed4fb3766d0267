"""What a plan and a refusal say: alternatives and their commands, what was rejected and offered, notes, and the figures of the JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from planner_card import Card, plan
from planner_table import REQUEST, Table, trials_of
from wanvram.config import Request, RunConfig, Strategy
from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import StageForecast, Trial, Trials, choices
from wanvram.planner.refusal import _smaller_sizes, least_peak, refuse
from wanvram.planner.result import Offer, Plan, Refusal, changed_knobs
from wanvram.planner.search import Options, _change, _gained, _offers, _rejected, cleared, planned_base
from wanvram.record import AttentionChoice, AttentionUse
from wanvram.simulate.gpus import find_gpu
from wanvram.units import GIB

BASE = Strategy(offload=True)
T2V = Request.for_task("t2v-14B", size="1280*720", prompt="a cat", base_seed=5)


@dataclass
class Sized:
    """A byte for each pixel and frame of the transformer, which is the largest; others take `rest`."""

    rest: int = 0
    host: int = 0

    def __call__(self, config: RunConfig, name: str) -> StageForecast:
        r = config.request
        peak = r.width * r.height * r.frame_num if name == "dit" else self.rest
        return StageForecast(name, peak, peak, peak, 0, self.host, 1.0, 1.0)


def refused(
    limit: int, request: Request = T2V, ram: int | None = None, forecast: Any = None, gpu: str = "h200"
) -> Refusal:
    budget = Budget(limit, margin_bytes=0, ram_bytes=ram, gpu=gpu)
    return refuse(Trials(request, budget, forecast or Sized()), BASE)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def pixels(size: str, frames: int = 1) -> int:
    width, height = map(int, size.split("*"))
    return width * height * frames


def test_a_refusal_names_the_component_the_budget_and_what_would_fit() -> None:
    result = refused(pixels("832*480", 81))
    assert (result.memory, result.component) == ("device", "dit")
    assert result.smallest_bytes == 107374182, "a tenth of a GiB holds the 71 MiB of it"
    found = [(a.size, a.frame_num, a.peak_device_bytes) for a in result.alternatives]
    assert found == [("832*480", 81, pixels("832*480", 81)), ("1280*720", 33, pixels("1280*720", 33))]
    assert result.message == (
        "t2v-14B 1280*720 with 81 frames does not fit 30.8 MiB: the dit needs a budget of 102.4 MiB even with every lossless saving "
        "(margin included); it would fit with --size 832*480, or with --frame_num 33"
    )
    assert [command.split(" --size ")[1].split()[:3] for command in result.commands] == [
        ["'832*480'", "--frame_num", "81"],
        ["'1280*720'", "--frame_num", "33"],
    ]
    assert all("--vram 32348160 " in f"{command} " and "--ram" not in command for command in result.commands)


@pytest.mark.parametrize(
    ("frames", "found"),
    [(81, [("832*480", 81)]), (80, []), (77, []), (5, []), (1, [])],
)
def test_an_alternative_fits_to_the_byte_or_is_none(frames: int, found: list[tuple[str, int]]) -> None:
    result = refused(pixels("832*480", frames))
    same_frames = [(a.size, a.frame_num) for a in result.alternatives if a.frame_num == 81]
    assert same_frames == found
    fewer = [(a.size, a.frame_num) for a in result.alternatives if a.frame_num != 81]
    most = pixels("832*480", frames) // pixels("1280*720")
    if most >= 1:
        assert fewer == [("1280*720", (most - 1) // 4 * 4 + 1)]
    else:
        assert fewer == [("832*480", frames)], "fewer frames of the smallest size, where nothing else fits"


def test_the_most_frames_are_fewer_than_asked_for_and_two_pictures_keep_five() -> None:
    one_frame_less = refused(pixels("1280*720", 77))
    assert ("1280*720", 77) in [(a.size, a.frame_num) for a in one_frame_less.alternatives]
    two = Request.for_task("flf2v-14B", size="832*480", frame_num=9)
    assert [(a.size, a.frame_num) for a in refused(pixels("832*480", 5), two).alternatives] == [("832*480", 5)]
    assert refused(pixels("832*480", 5) - 1, two).alternatives == ()
    assert "would fit" not in refused(pixels("832*480", 5) - 1, two).message


def test_what_another_component_needs_is_in_the_peak_and_in_the_way_of_an_alternative() -> None:
    limit = pixels("832*480", 81)
    (first, _) = refused(limit, forecast=Sized(rest=limit)).alternatives
    assert first.peak_device_bytes == limit
    assert refused(limit, forecast=Sized(rest=limit + 1)).alternatives == ()


def test_of_an_alternative_the_component_that_did_not_fit_is_forecast_first_and_alone_where_it_does_not_again() -> None:
    asked: list[tuple[str, str]] = []

    def forecast(config: RunConfig, name: str) -> StageForecast:
        asked.append((config.request.size, name))
        return Sized()(config, name)

    refused(pixels("832*480", 80) // 80, forecast=forecast, request=replace(T2V, frame_num=5))
    assert {name for size, name in asked if size == "832*480"} == {"dit", "text_encoder", "vae_decoder"}, (
        "a frame of it fits"
    )
    asked.clear()
    refused(1000, forecast=forecast)
    assert {name for size, name in asked if size == "832*480"} == {"dit"}


def test_smaller_sizes_are_of_the_same_orientation_the_largest_first() -> None:
    assert _smaller_sizes(T2V) == ["832*480"]
    assert _smaller_sizes(Request.for_task("t2v-14B", size="720*1280")) == ["480*832"]
    assert _smaller_sizes(Request.for_task("t2i-14B", size="1024*1024")) == ["1280*720", "832*480"]
    assert _smaller_sizes(Request.for_task("t2i-14B", size="1280*720")) == ["832*480"]
    assert _smaller_sizes(REQUEST) == []


def test_the_ram_and_a_card_that_is_too_small_are_said() -> None:
    result = refused(pixels("832*480", 81), ram=64 * GIB)
    assert "even with every lossless saving that 64.00 GiB of host RAM allow (margin included)" in result.message
    assert all("--ram 64GiB" in command for command in result.commands)
    card = find_gpu("rtx4060")

    def needs(nbytes: int) -> str:
        return refused(
            GIB, forecast=lambda config, name: Table(peak=lambda *_: nbytes)(config, name), gpu="rtx4060"
        ).message

    rounded = card.total_bytes // (GIB // 10) * (GIB // 10)
    assert "more than" not in needs(rounded - GIB // 10)
    assert "(margin included), more than the NVIDIA GeForce RTX 4060 8GB has" in needs(card.total_bytes)


def test_a_budget_that_the_device_keeps_is_refused_for_host_ram() -> None:
    result = refused(pixels("1280*720", 81), ram=16 * GIB, forecast=Sized(host=20 * GIB))
    assert (result.memory, result.smallest_bytes, result.alternatives) == ("host", 27 * GIB, ())
    assert result.message == (
        "within 71.2 MiB of device memory the text_encoder needs 27.00 GiB of host RAM with what is kept for the system, but "
        "--ram is 16.00 GiB; give more of either"
    )
    assert refused(pixels("1280*720", 81) - 1, ram=16 * GIB, forecast=Sized(host=20 * GIB)).memory == "device"


def test_the_least_peak_is_that_of_the_savings_that_ram_allows_or_of_all_where_it_allows_none() -> None:
    def trials(host: int) -> Trials:
        pinned = Table(
            peak=lambda name, s: 10 if s.residual_in == "pinned" else 20 if s.attention_slicing else 30,
            host=lambda name, s: host if s.residual_in == "pinned" else 0,
        )
        return trials_of(pinned, 5, ram=40)

    assert (least_peak(trials(40), BASE, "dit"), least_peak(trials(41), BASE, "dit")) == (10, 20)
    assert least_peak(trials_of(Table(peak=lambda name, s: s.vae_tile or 99), 5), BASE, "vae_decoder") == 20
    t5 = Table(peak=lambda name, s: 3 if s.t5_cpu else 7 if s.load_strategy == "block" else 9)
    assert least_peak(trials_of(t5, 5), BASE, "text_encoder") == 3
    i2v = trials_of(t5, 5, request=Request.for_task("i2v-14B"))
    assert least_peak(i2v, BASE, "image_encoder") == 7
    assert least_peak(trials_of(Table(host=lambda name, s: 41), 5, ram=40), BASE, "dit") == 1


# --- what was rejected -------------------------------------------------------------------------------------------------------


def failed(
    name: str, strategy: Strategy, forecast: StageForecast | None, memory: str = "device", needed: int = 101
) -> Trial:
    return Trial(name, strategy, memory, needed, 100, forecast)


def of(name: str, seconds: float | None, step: float | None = None) -> StageForecast:
    return StageForecast(name, 101, 101, 101, 0, 0, step, seconds)


def chosen_trials() -> tuple[Trials, Strategy]:
    """A plan of 3 s and ten steps of a second, 13 s in all; the same with blocks streamed is known to take as long."""
    return trials_of(Table(), 100), replace(BASE, load_strategy="block", vae_tile=30)


def test_a_rejected_choice_is_the_knobs_that_differ_and_what_the_whole_run_would_gain() -> None:
    trials, chosen = chosen_trials()
    full = replace(chosen, load_strategy="full")
    trials.failed = [
        failed("dit", full, of("dit", 1.0, 0.5)),
        failed("vae_decoder", replace(chosen, vae_tile=52), of("vae_decoder", 0.25)),
    ]
    first, second = _rejected(trials, chosen)
    assert (first.component, first.change, first.seconds_gained) == ("dit", {"load_strategy": "full"}, 5.0)
    assert (first.memory, first.needed_bytes, first.limit_bytes) == ("device", 101, 100)
    assert (second.component, second.change, second.seconds_gained) == ("vae_decoder", {"vae_tile": 52}, 0.75)


def test_what_gains_nothing_or_changes_nothing_is_not_listed_and_each_change_once() -> None:
    trials, chosen = chosen_trials()
    tiled = replace(chosen, vae_tile=52)
    for forecast, gains in (
        (of("vae_decoder", 1.0), []),
        (of("vae_decoder", 0.5), [0.5]),
        (of("vae_decoder", None), [None]),
    ):
        trials.failed = [failed("vae_decoder", tiled, forecast)]
        assert [r.seconds_gained for r in _rejected(trials, chosen)] == gains
    trials.failed = [failed("vae_decoder", chosen, of("vae_decoder", 0.5))]
    assert _rejected(trials, chosen) == []
    trials.failed = [failed("vae_decoder", tiled, of("vae_decoder", s), needed=n) for s, n in ((0.5, 101), (0.25, 102))]
    assert [(r.seconds_gained, r.needed_bytes) for r in _rejected(trials, chosen)] == [(0.75, 102)], (
        "the last forecast of it"
    )
    trials.failed = [
        failed("vae_decoder", tiled, of("vae_decoder", 0.5)),
        failed("vae_decoder", tiled, of("vae_decoder", 0.5), "host"),
    ]
    assert [r.memory for r in _rejected(trials, chosen)] == ["device", "host"]


def test_resident_blocks_are_no_choice_of_their_own_nor_is_the_home_of_what_is_not_streamed() -> None:
    _, chosen = chosen_trials()
    more = replace(chosen, resident_blocks=9, attention_slicing=True)
    assert _change(failed("dit", more, of("dit", 1.0)), chosen) == {"attention_slicing": True}
    disk = replace(chosen, weights_in="disk")
    assert _change(failed("dit", replace(chosen, load_strategy="full"), of("dit", 1.0)), disk) == {
        "load_strategy": "full"
    }
    assert _change(failed("dit", chosen, of("dit", 1.0)), disk) == {"weights_in": "pinned"}
    assert _change(failed("dit", chosen, None), disk) == {"weights_in": "pinned"}
    assert _change(failed("vae_decoder", more, of("vae_decoder", 1.0)), chosen) == {}


def test_what_is_gained_counts_components_that_move_with_it_as_they_were_forecast() -> None:
    trials, chosen = chosen_trials()
    full = replace(chosen, load_strategy="full")
    trial = failed("dit", full, of("dit", 1.0, 0.5))
    assert _gained(trials, trial, chosen) == 5.0
    trials._known[choices("text_encoder", full)] = of("text_encoder", 0.25)
    assert _gained(trials, trial, chosen) == 5.75
    assert _gained(trials, failed("vae_decoder", full, of("vae_decoder", 0.5)), chosen) == 0.5, "the VAE moves alone"
    assert _gained(trials, failed("dit", full, None), chosen) is None


# --- offers and notes --------------------------------------------------------------------------------------------------------


def test_an_offer_is_the_difference_of_two_forecasts_of_the_components_it_touches() -> None:
    def figure(plain: int, lossy: int) -> Any:
        return lambda name, s: lossy if name == "dit" and s.weight_storage == "fp8" else plain if name == "dit" else 40

    table = Table(
        peak=figure(100, 60),
        host=figure(50, 20),
        seconds=lambda name, s: 2.0 if s.weight_storage == "fp8" and name == "dit" else 1.0,
    )
    table.peak = lambda name, s: 90 if name == "vae_decoder" else figure(100, 60)(name, s)
    offers = {next(iter(o.change)): o for o in _offers(trials_of(table, 200), BASE)}
    assert offers["weight_storage"] == Offer("dit", {"weight_storage": "fp8"}, 40, 10, 30, -1.0)
    assert list(offers) == ["weight_storage"], "what is not felt is not offered"


def test_an_offer_is_felt_in_either_memory_or_in_time() -> None:
    nothing = Offer("dit", {}, 0, 0, 0, 0.0)
    assert not nothing.is_felt
    assert not replace(nothing, seconds_saved=None, peak_saved_bytes=5).is_felt
    assert replace(nothing, device_saved_bytes=-1).is_felt
    assert replace(nothing, host_saved_bytes=1).is_felt
    assert replace(nothing, seconds_saved=-0.5).is_felt


def test_each_note_of_a_plan_has_its_reason_and_without_one_there_is_none() -> None:
    def notes(budget: Budget, **card: Any) -> list[str]:
        return list(plan(REQUEST, budget, Options(), Card(**card)).notes)

    assert notes(Budget(40 * GIB, ram_bytes=64 * GIB)) == []
    assert notes(Budget(40 * GIB)) == ["host RAM was not limited; --ram 16GiB makes the plan respect it"]
    assert notes(Budget(40 * GIB, ram_bytes=64 * GIB, notes=("first",)), timed=False) == [
        "first",
        "times are unknown: choices were ordered by how much they usually cost, not by prediction",
    ]
    card = find_gpu("rtx4090")
    measured = f"{card.name}: {card.note}; memory and time were not measured on this card"
    assert notes(Budget(card.total_bytes, ram_bytes=64 * GIB, gpu="rtx4090")) == [measured]
    assert notes(Budget(24 * GIB, ram_bytes=64 * GIB, gpu="rtx4090")) == [
        measured,
        "the NVIDIA GeForce RTX 4090 offers a process 23.52 GiB, so that is the budget",
    ]
    lossy = plan(REQUEST, Budget(40 * GIB, ram_bytes=64 * GIB), Options(Strategy(weight_storage="fp8")), Card())
    assert lossy.notes == ("weight_storage fp8 is lossy and was asked for",)


def test_lossy_knobs_are_forecast_unless_nobody_asks() -> None:
    assert Options().offers
    assert plan(REQUEST, Budget(40 * GIB), Options(), Card()).offers != ()
    assert plan(REQUEST, Budget(40 * GIB), Options(offers=False), Card()).offers == ()


def test_what_the_planner_decides_is_cleared_and_what_the_user_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Strategy(precision="fp16", load_strategy="block", vae_tile=30, batch_size=2, weight_storage="fp8")
    assert cleared(given) == Strategy(precision="fp16", offload=True, batch_size=2, weight_storage="fp8")
    for platform, segments in (("linux", True), ("darwin", False)):
        monkeypatch.setattr("sys.platform", platform)
        assert planned_base(Strategy()).expandable_segments is segments


# --- the figures of a plan ---------------------------------------------------------------------------------------------------


def made(**given: Any) -> Plan:
    stages = (
        of("text_encoder", 1.0),
        replace(of("dit", 3.0, 2.0), peak_device_bytes=500, host_bytes=7),
        of("vae_decoder", 4.0),
    )
    return Plan(REQUEST, Budget(8 * GIB, ram_bytes=64 * GIB, gpu="h200"), BASE, stages, **given)


def test_the_whole_runs_figures_count_where_there_are_some_and_else_the_stages() -> None:
    plain, whole = made(), made(whole_run_bytes=400, whole_run_seconds=9.5)
    assert (plain.peak_device_bytes, plain.seconds, plain.seconds_per_step, plain.host_bytes) == (
        500,
        28.0,
        2.0,
        3 * GIB + 7,
    )
    assert (whole.peak_device_bytes, whole.seconds) == (400, 9.5)


def test_the_json_of_a_plan_and_of_a_refusal_have_the_schema_the_budget_and_every_figure() -> None:
    document = made(whole_run_bytes=400).to_json()
    assert (document["schema"], document["fits"], document["peak_device_bytes"]) == (1, True, 400)
    assert (document["seconds"], document["seconds_per_step"], document["attention"]) == (28.0, 2.0, None)
    assert [s["total_seconds"] for s in document["stages"]] == [1.0, 23.0, 4.0]
    assert document["changed"] == {"offload": True}
    budget = {"vram_bytes": 8 * GIB, "usable_bytes": 8 * GIB, "margin_bytes": 128849019, "ram_bytes": 64 * GIB}
    budget |= {"ram_kept_bytes": 8 * GIB, "gpu": "h200", "gpu_measured": True, "gpus": 1, "link": None}
    assert document["budget"] == budget
    refusal = refused(pixels("832*480", 81)).to_json()
    assert (refusal["schema"], refusal["fits"], refusal["memory"], refusal["component"]) == (1, False, "device", "dit")
    assert (refusal["budget"]["ram_kept_bytes"], refusal["budget"]["margin_bytes"]) == (None, 0)
    assert [a["frame_num"] for a in refusal["alternatives"]] == [81, 33]
    assert len(refusal["commands"]) == 2


def test_what_the_run_attends_with_is_in_the_json() -> None:
    use = AttentionUse("flash", "measured")
    attention = made(attention=AttentionChoice("auto", "flash", "table", use, use)).to_json()["attention"]
    assert (attention["taken"], attention["self_attention"]["backend"]) == ("flash", "flash")


def test_changed_knobs_are_those_that_differ_from_the_plain_run_or_another_among_some() -> None:
    from wanvram.knobs import VAE_TILE

    tiled = Strategy(vae_tile=30, offload=True)
    assert changed_knobs(tiled) == {"offload": True, "vae_tile": 30}
    assert changed_knobs(tiled, Strategy(vae_tile=30)) == {"offload": True}
    assert changed_knobs(tiled, among=(VAE_TILE,)) == {"vae_tile": 30}

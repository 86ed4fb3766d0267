"""What computes attention: registry, the choice on each card, the cache of `wanvram check --attention`, refusals, memory and time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanvram import knobs
from wanvram.cli.main import main
from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.devices import SimulatedDevice
from wanvram.errors import DeviceError, InputError
from wanvram.kernels.attention_backends import BACKENDS, LONG_KEYS, Backend, chosen
from wanvram.kernels.fused_attention import reference, usable
from wanvram.kernels.scaled_attention import attention, attention_with_sums
from wanvram.machine import attention_cache
from wanvram.machine.attention_cache import CROSS, SELF, Conditions, Measured, ShapeTimes, cache_file, found, keep, read
from wanvram.machine.attention_choice import Card, Heads, choose, fastest, require_package
from wanvram.machine.attention_speed import checked_here
from wanvram.predict.plan import planned_config
from wanvram.predict.simulate import simulate, simulated_device
from wanvram.record import AttentionChoice, AttentionUse, RunRecord
from wanvram.run import in_force
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.clock import Costs
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.memory import SimulatedMemory

BY_NAME = {backend.name: backend for backend in BACKENDS}
HALF = Heads(2, 128)
HERE = Conditions("NVIDIA GeForce RTX 4090", "580.1", "2.11.0+cu130", 91900, None)
TIMES = Measured(
    HERE,
    (
        ShapeTimes("self", 12, 8190, 32760, {"flash": 0.012, "efficient": 0.024}),
        ShapeTimes("cross", 12, 8190, 512, {"flash": 0.001, "efficient": 0.002}),
    ),
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4, as far as its version is asked for."""
    monkeypatch.setattr(Backend, "version", lambda self: "4.0.0b36" if self.package else None)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "version", lambda self: None)


def card(key: str, **more: Any) -> Card:
    return Card(GPUS[key].name, GPUS[key].compute_capability, GPUS[key].measured, **more)


# --- registry and knob --------------------------------------------------------------------------------------------------------


def test_the_knob_offers_auto_and_every_backend_of_the_registry() -> None:
    assert knobs.ATTENTION.choices == ("auto", *(backend.name for backend in BACKENDS))
    assert knobs.ATTENTION.flag == "--attention"
    assert knobs.ATTENTION.lossless


def test_a_plan_takes_the_knob_as_it_is_given() -> None:
    assert knobs.ATTENTION not in knobs.planned()
    assert knobs.ATTENTION in knobs.asked()


def test_every_backend_has_a_pace_with_a_source_on_every_card_it_computes_on() -> None:
    for backend in BACKENDS:
        for gpu in GPUS.values():
            if backend.on(gpu.compute_capability):
                rate = backend.rate(gpu.compute_capability)
                assert 0.1 < rate.pace < 2
                assert rate.source


@pytest.mark.parametrize(
    ("asked", "keys", "taken"),
    [
        ("auto", 75600, "cudnn"),
        ("fa4", 75600, "fa4"),
        ("fa4", LONG_KEYS, "cudnn"),
        ("fa4", 512, "cudnn"),
        ("flash", 512, "flash"),
        ("efficient", 75600, "efficient"),
    ],
)
def test_few_keys_are_left_to_pytorch_s_own_where_that_is_faster(asked: str, keys: int, taken: str) -> None:
    assert chosen((9, 0), 2, 128, keys, asked).name == taken


def test_numbers_that_a_backend_does_not_take_go_to_the_next() -> None:
    assert chosen((9, 0), 4, 128, 75600, "fa4").name == "efficient"


# --- what auto comes to -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("key", "own", "cross"),
    [
        ("h200", "fa4", "cudnn"),
        ("h100", "fa4", "cudnn"),
        ("b200", "fa4", "cudnn"),
        ("rtx5090", "flash", "flash"),
        ("rtx4090", "flash", "flash"),
        ("rtx4060", "flash", "flash"),
        ("rtx3090", "flash", "flash"),
        ("rtx3060-12gb", "flash", "flash"),
        ("a100-80gb", "flash", "flash"),
        ("l40s", "flash", "flash"),
        ("t4", "efficient", "efficient"),
    ],
)
def test_with_flash_attn_4_auto_takes_it_where_it_has_kernels_of_its_own(key: str, own: str, cross: str) -> None:
    found = choose("auto", card(key), HALF)
    assert (found.self_attention.backend, found.cross_attention.backend) == (own, cross)
    assert found.basis == "table"


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(("key", "taken"), [("h200", "cudnn"), ("b200", "cudnn"), ("rtx4090", "flash")])
def test_without_the_package_auto_is_pytorch_s_own_order(key: str, taken: str) -> None:
    assert choose("auto", card(key), HALF).taken == taken


@pytest.mark.usefixtures("absent")
def test_an_estimate_of_fa4_needs_no_package_and_a_run_does() -> None:
    asked = choose("fa4", card("h200"), HALF)
    assert asked.self_attention == AttentionUse("fa4", "measured on an H200")
    with pytest.raises(InputError, match=r"fa4 is asked for.*flash-attn-4 is not installed here.*wanvram\[fa4\]"):
        require_package(asked)


@pytest.mark.usefixtures("installed")
def test_few_tokens_are_attended_to_by_cudnn_though_fa4_is_taken() -> None:
    found = choose("fa4", card("h200"), replace(HALF, keys=1560))
    assert (found.taken, found.self_attention.backend) == ("fa4", "cudnn")


@pytest.mark.parametrize(
    ("asked", "key", "sentence"),
    [
        (
            "cudnn",
            "rtx4090",
            "cudnn computes on cards of compute capability 9.0 or newer and older than 12.0; NVIDIA GeForce RTX 4090",
        ),
        ("fa4", "t4", "fa4 computes on cards of compute capability 8.0 or newer"),
        (
            "flash",
            "v100-32gb",
            "flash computes on cards of compute capability 8.0 or newer; Tesla V100-SXM2-32GB has 7.0",
        ),
    ],
)
def test_a_card_that_cannot_compute_it_is_a_sentence(asked: str, key: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        choose(asked, card(key), HALF)
    assert sentence in str(caught.value)


def test_a_refused_backend_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "t2v-1.3B", "--size", "480p", "--frame_num", "5", "--gpu", "rtx4090", "--precision", "bf16"]
    assert main(["estimate", *flags, "--attention", "cudnn"]) == 2
    assert "compute capability 9.0" in capsys.readouterr().err


def test_16_bit_backends_are_refused_with_fp32_at_once() -> None:
    with pytest.raises(InputError, match=r"attention_backend: fa4 computes 16-bit numbers only"):
        Strategy(precision="fp32", attention_backend="fa4")
    assert Strategy(precision="fp32", attention_backend="efficient").precision == "fp32"


def test_the_cpu_has_no_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = [
        "generate",
        "--task",
        "t2v-1.3B",
        "--ckpt_dir",
        "tiny",
        "--device",
        "cpu",
        "--prompt",
        "x",
        "-o",
        str(tmp_path / "run"),
    ]
    assert main([*run, "--size", "480p", "--frame_num", "5", "--precision", "bf16", "--attention", "flash"]) == 2
    assert "flash computes on NVIDIA GPUs" in capsys.readouterr().err


@pytest.mark.usefixtures("absent")
def test_what_this_pytorch_does_not_have_is_left_out_by_auto_and_not_by_a_name() -> None:
    without = card("rtx4090", refused=frozenset({"flash"}))
    assert choose("auto", without, HALF).taken == "efficient"
    assert choose("flash", without, HALF).taken == "flash"  # run.in_force says that it is refused
    assert choose("auto", card("h200", refused=frozenset({"cudnn", "flash", "efficient"})), HALF).taken == "cudnn"


# --- the cache ----------------------------------------------------------------------------------------------------------------


def test_a_card_without_figures_of_its_own_takes_what_was_fastest_here() -> None:
    slow_flash = replace(
        TIMES, shapes=(replace(TIMES.shapes[0], seconds={"flash": 0.03, "efficient": 0.02}), TIMES.shapes[1])
    )
    found = choose("auto", card("rtx4090", checked=slow_flash), HALF)
    assert (found.taken, found.basis) == ("efficient", "check")
    assert choose("auto", card("h200", checked=slow_flash), HALF).basis == "table"
    assert choose("flash", card("rtx4090", checked=slow_flash), HALF).basis == "asked"


@pytest.mark.usefixtures("installed")
def test_fa4_is_judged_with_the_fastest_other_for_few_keys() -> None:
    own, cross = TIMES.shapes
    both = {"flash": 0.001, "efficient": 0.002, "fa4": 0.009}
    shapes = (replace(own, seconds={**own.seconds, "fa4": 0.0115}), replace(cross, seconds=both))
    assert fastest(replace(TIMES, shapes=shapes)) == "fa4"
    assert choose("auto", card("rtx4090", checked=replace(TIMES, shapes=shapes)), HALF).taken == "fa4"


def test_a_measurement_of_nothing_known_decides_nothing() -> None:
    assert fastest(Measured(HERE, ())) is None
    assert fastest(Measured(HERE, (replace(TIMES.shapes[0], seconds={"unheard": 0.1}),))) is None


def test_what_is_kept_is_found_again_under_the_same_conditions_only(tmp_path: Path) -> None:
    path = keep(TIMES, tmp_path / "new" / "attention.json")
    assert found(HERE, path) == (TIMES, "")
    for other in (
        {"driver": "590"},
        {"torch": "2.13.0"},
        {"cudnn": 92000},
        {"flash_attn": "4.0.0"},
        {"card": "NVIDIA L4"},
    ):
        assert found(replace(HERE, **other), path) == (None, "")


def test_another_card_is_kept_beside_and_other_versions_replace(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    other = replace(TIMES, conditions=replace(HERE, card="NVIDIA L4"))
    newer = replace(TIMES, conditions=replace(HERE, driver="590"))
    for measured in (TIMES, other, newer):
        keep(measured, path)
    assert read(path) == ((other, newer), "")
    assert [name.name for name in tmp_path.iterdir()] == ["attention.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no JSON"),
        ("[1, 2]", "expected a section"),
        ('{"schema": 2, "measured": []}', "its schema is 2, not 1"),
        ('{"measured": []}', "'schema' is missing"),
        ('{"schema": 1, "measured": [{"conditions": 3, "shapes": []}]}', "measured.0.conditions"),
        ("\x00\xff", ""),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_or_foreign_cache_is_passed_over_with_a_note(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    path.write_text(text, encoding="latin-1")
    measured, note = found(HERE, path)
    assert measured is None
    assert "was passed over" in note
    assert said in note
    keep(TIMES, path)
    assert found(HERE, path) == (TIMES, "")


@pytest.mark.parametrize("value", [0, -1.0, "fast", None, True, []])
def test_a_time_that_is_none_is_damage(value: Any, tmp_path: Path) -> None:
    path = keep(TIMES, tmp_path / "attention.json")
    data = json.loads(path.read_text())
    data["measured"][0]["shapes"][0]["seconds"]["flash"] = value
    path.write_text(json.dumps(data))
    measured, note = read(path)
    assert measured == ()
    assert "seconds.flash is no time" in note


def test_a_directory_in_the_cache_s_place_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "attention.json").mkdir()
    assert "was passed over" in read(tmp_path / "attention.json")[1]


def test_the_cache_lies_in_the_user_s_cache_folder() -> None:
    assert cache_file({"HOME": "/home/u"}, "linux") == Path("/home/u/.cache/wanvram/attention.json")
    assert cache_file({"HOME": "/home/u", "XDG_CACHE_HOME": "/var/c"}, "linux") == Path("/var/c/wanvram/attention.json")
    assert cache_file({"HOME": "/home/u", "XDG_CACHE_HOME": "relative"}, "linux").is_relative_to("/home/u/.cache")
    windows = cache_file({"USERPROFILE": "/u", "LOCALAPPDATA": "/u/local"}, "win32")
    assert windows == Path("/u/local/wanvram/attention.json")


def test_a_note_of_the_cache_comes_into_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    path.write_text("{")
    monkeypatch.setattr(attention_cache, "cache_file", lambda: path)
    monkeypatch.setattr("wanvram.machine.attention_speed.conditions_here", lambda: HERE)
    monkeypatch.setattr("wanvram.predict.simulate.is_here", lambda key: key == "rtx4090")
    checked_here.cache_clear()
    record, _ = simulate(config("rtx4090"))
    checked_here.cache_clear()
    assert any("was passed over" in note for note in record.notes)


# --- memory and time on the simulated card ------------------------------------------------------------------------------------


def config(gpu: str, asked: str = "auto", **request: Any) -> RunConfig:
    wanted = {"size": "832*480", "frame_num": 5, "sample_steps": 1} | request
    strategy = Strategy(load_strategy="block", offload=True, attention_backend=asked)
    return RunConfig("x", "", "simulated", Request.for_task("t2v-1.3B", **wanted), strategy, gpu=gpu)


@pytest.mark.parametrize(
    ("asked", "keys", "before", "during", "library"),
    [
        ("cudnn", 8192, [8, 8], [256], "attention"),
        ("flash", 8192, [], [4 * 12 * 4096, 16, 8], None),
        ("efficient", 8192, [], [], None),
        ("fa4", 8192, [], [], "fa4"),
        ("fa4", 512, [8, 8], [256], "attention"),
    ],
)
def test_each_backend_takes_what_the_registry_says_beside_its_output(
    asked: str, keys: int, before: list[int], during: list[int], library: str | None
) -> None:
    gpu = GPUS["h200"]
    allocator = CachingAllocator(AllocatorSettings(False), total_bytes=gpu.total_bytes)
    memory = SimulatedMemory(gpu, allocator, Libraries(gpu), keep_events=True)
    device = SimulatedDevice(memory)
    with device.session():
        q = device.empty((4096, 12, 128), torch.bfloat16)
        k = device.empty((keys, 12, 128), torch.bfloat16)
        assert memory.events is not None
        memory.events.clear()
        out = attention(q, k, k, asked)
        events = [event.nbytes for event in memory.events]
    assert events == [*before, out.nbytes, *during, *(-n for n in (*reversed(during), *reversed(before)))]
    assert library is None or library in memory._loaded


def test_fa4_is_faster_for_long_attention_and_flash_slower_by_what_was_measured() -> None:
    """h200.md: 208.5, 328.8 and 175.0 ms for 40 heads x 75600 x 75600."""
    costs = Costs(GPUS["h200"])
    price = costs.price("wanvram.attention.default")
    assert price is not None
    q = torch.empty((75600, 40, 128), dtype=torch.bfloat16, device="meta")
    measured = {"cudnn": 0.2085, "flash": 0.3288, "fa4": 0.1750}
    for name, seconds in measured.items():
        assert costs.seconds(price.work((q, q, q, name), q)) == pytest.approx(seconds, rel=0.03), name


@pytest.mark.usefixtures("absent")
def test_a_record_says_what_attended_and_why() -> None:
    record, _ = simulate(config("h200", "fa4", frame_num=17))
    assert record.attention == AttentionChoice(
        "fa4", "fa4", "asked", AttentionUse("fa4", "measured on an H200"), AttentionUse("cudnn", "measured on an H200")
    )
    assert RunRecord.from_json(json.loads(json.dumps(record.to_json()))).attention == record.attention
    damaged = record.to_json()
    damaged["attention"]["basis"] = "guess"
    with pytest.raises(InputError, match=r"attention\.basis is none of"):
        RunRecord.from_json(damaged)


def test_a_plan_names_the_backend_that_it_assumed() -> None:
    from wanvram.planner import Budget, Plan, StageForecast

    asked = config("h200")
    plan = Plan(
        asked.request,
        Budget(8 * 2**30, gpu="rtx4090"),
        asked.strategy,
        (StageForecast("dit", 0, 0, 0, 0, 0, 1.0, 1.0),),
    )
    assert planned_config(asked, plan).strategy.attention_backend == "flash"


@pytest.mark.usefixtures("installed")
def test_auto_means_the_same_to_an_estimate_and_to_a_run() -> None:
    simulated = simulated_device(config("h100", frame_num=17)).attention
    device: Any = SimpleNamespace(name="cuda:NVIDIA H100 80GB HBM3", torch_device=torch.device("meta"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=GPUS["h100"].total_bytes)
        )
        from wanvram.run.attention import attention_of, card_here

        patched.setattr("wanvram.run.attention._refused", lambda *_: frozenset())
        patched.setattr("wanvram.run.attention.why_broken", lambda _: None)
        asked = config("h100", frame_num=17)
        assert attention_of(asked, card_here(asked, device)) == simulated


def test_reports_say_what_attended() -> None:
    from wanvram.report.runs import Run
    from wanvram.report.terminal import attention_line, summarize
    from wanvram.report.translations import Texts

    record, _ = simulate(config("h200", "fa4", frame_num=17))
    assert "Attention: fa4 among the video's tokens, cudnn to the prompt's (asked for, or planned)" in summarize(record)
    nothing: Any = None
    settings = Run("x", record, nothing, exact=True).settings()
    assert (settings["attention.self"], settings["attention.cross"]) == ("fa4", "cudnn")
    assert record.attention is not None
    same = replace(record.attention, self_attention=record.attention.cross_attention, basis="check")
    assert attention_line(same, Texts()) == "Attention: cudnn (auto, by `wanvram check --attention` on this machine)"
    assert attention_line(same, Texts("zh")).startswith("注意力：cudnn")


# --- in force -----------------------------------------------------------------------------------------------------------------


def found_in_force(**more: Any) -> dict[str, Any]:
    return {"expandable_segments": False, "attention": {}, "torch": "2.11.0"} | more


def test_a_backend_that_pytorch_refuses_is_an_error_that_names_both_sides() -> None:
    device: Any = SimpleNamespace(name="cuda:NVIDIA H200", attention=None)
    planned = config("h200", "cudnn")
    with pytest.raises(DeviceError, match=r"the plan assumed cudnn for attention, but PyTorch 2.11.0 refuses it here"):
        in_force.check_in_force(planned, found_in_force(attention={"cudnn": False}), device)
    in_force.check_in_force(planned, found_in_force(attention={"cudnn": True}), device)


def test_a_plan_that_assumed_one_backend_does_not_run_with_another() -> None:
    here = choose("auto", card("rtx4090", checked=replace(TIMES, shapes=(
        replace(TIMES.shapes[0], seconds={"flash": 0.03, "efficient": 0.02}), TIMES.shapes[1]))), HALF)  # fmt: skip
    device: Any = SimpleNamespace(name="cuda:NVIDIA GeForce RTX 4090", attention=here)
    with pytest.raises(DeviceError, match=r"assumed flash, but efficient is taken here \(check\)"):
        in_force._check_attention(config("rtx4090"), GPUS["rtx4090"], device)
    pinned = replace(device.attention, taken="flash", basis="asked")
    in_force._check_attention(config("rtx4090", "flash"), GPUS["rtx4090"], SimpleNamespace(name="", attention=pinned))


# --- the functions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 33), (64, 1)])
def test_the_reference_gives_attention_and_its_log_sum_exps(queries: int, keys: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 3, 16) for n in (queries, keys, keys))
    out, sums = attention_with_sums(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4
    torch.testing.assert_close(sums, scores.exp().sum(-1).log())
    assert out.is_contiguous()


def test_parts_of_the_keys_are_joined_by_their_log_sum_exps() -> None:
    """What a ring does."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 16) for n in (9, 20, 20))
    whole, _ = reference(q, k, v)
    parts = [attention_with_sums(q, k[c], v[c]) for c in (slice(0, 6), slice(6, 20))]
    total = torch.stack([sums for _, sums in parts]).logsumexp(0)
    joined = sum(out * (sums - total).exp().t()[..., None] for out, sums in parts)
    torch.testing.assert_close(joined, whole)


def test_every_backend_s_function_is_there() -> None:
    assert all(callable(backend.function()) for backend in BACKENDS)


@pytest.mark.usefixtures("absent")
def test_pytorch_is_asked_whether_a_backend_is_usable() -> None:
    """The CPU has PyTorch's flash attention and no other."""
    like = torch.empty((64, 1, 128), dtype=torch.bfloat16)
    assert [name for name, backend in BY_NAME.items() if usable(backend, like)] == ["flash"]


@pytest.mark.usefixtures("installed")
def test_a_package_that_cannot_be_imported_here_is_passed_over_by_auto_and_the_record_says_why() -> None:
    """flash-attn-4 is said to be installed, as after pip left out the kernels for this CUDA, and cannot be imported."""
    from wanvram.run.attention import attention_of, card_like

    def taken(gpu: str, asked: str = "auto", *, here: bool = True, **more: Any) -> tuple[str, str]:
        found = attention_of(config(gpu, asked, frame_num=81), replace(card_like(GPUS[gpu], here=here), **more))
        return found.taken, found.note

    name, note = taken("h200")
    assert name == "cudnn"
    assert note.startswith("fa4 was passed over: flash-attn-4 cannot be imported (")
    assert taken("h200", here=False) == ("fa4", ""), "another machine's card"
    assert taken("h200", "fa4") == ("fa4", ""), (
        "by its name it ends with a sentence at the first call, as the next test says"
    )
    assert taken("h200", "cudnn") == ("cudnn", "")
    times = {"fa4": 0.1, "flash": 1.0}
    checked = Measured(
        HERE, tuple(ShapeTimes(use, 12, 8190, keys, times) for use, keys in ((SELF, 32760), (CROSS, 512)))
    )
    assert taken("rtx4090", checked=checked)[0] == "flash", "where a check had found it fastest"


@pytest.mark.usefixtures("absent")
def test_the_package_is_imported_only_when_it_computes() -> None:
    with pytest.raises(InputError, match=r"flash-attn-4.*cannot be imported"):
        BY_NAME["fa4"].function()(*(torch.empty(1, 1, 8) for _ in range(3)))


# --- on a GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("keys", [8192, 512])
def test_a_usable_backend_computes_attention_and_takes_exactly_what_the_registry_says(name: str, keys: int) -> None:
    backend, device = BY_NAME[name], torch.device("cuda")
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    like = torch.empty((64, 1, 128), dtype=dtype, device=device)
    able = backend.takes(torch.cuda.get_device_capability(), 2, 128) and (not backend.package or backend.version())
    if not (able and usable(backend, like)):
        assert name in ("cudnn", "flash", "fa4"), "efficient computes everywhere"
        return
    q, k, v = (torch.randn((n, 12, 128), device=device, dtype=dtype) for n in (4096, keys, keys))
    expected, sums = reference(q, k, v, True)
    out, found_sums = backend.function()(q, k, v, True)
    torch.testing.assert_close(out, expected, rtol=1.6e-2, atol=2e-3)
    torch.testing.assert_close(found_sums, sums, rtol=1e-3, atol=1e-3)
    del out, found_sums, expected, sums
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = backend.function()(q, k, v)[0]
    torch.cuda.synchronize()
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - out.nbytes
    assert taken == sum(n for part in backend.extra(4096, 12) for n in part)

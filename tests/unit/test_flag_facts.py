"""Every flag as it is typed and what it becomes; and the budget that flags ask for, with the card and RAM of this machine or none."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planner_card import Card, plan
from wanvram import knobs
from wanvram.cli import generate
from wanvram.cli.budget import _with_free_sizes, budget_for, budget_of, planned
from wanvram.cli.flags import boolean, config_from_flags, of_gpus
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import BudgetError, DeviceError, InputError
from wanvram.planner import Refusal
from wanvram.planner.budget import Budget
from wanvram.planner.search import Options
from wanvram.predict import plan as predict_plan
from wanvram.units import GIB


def parsed(*flags: str) -> Namespace:
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    return parser.parse_args(flags)


def typed(*flags: str, device: str | None = None, base: RunConfig | None = None, **given: Any) -> RunConfig:
    others = {"weights": None, "gpu": None, "memory_limit_bytes": None} | given
    return config_from_flags(parsed(*flags), device=device, base=base, **others)


def refusal(*flags: str, **given: Any) -> str:
    with pytest.raises(InputError) as caught:
        typed(*flags, **given)
    return str(caught.value)


# --- what is typed -----------------------------------------------------------------------------------------------------------


def test_a_boolean_is_any_of_ten_words_in_any_case_and_nothing_else() -> None:
    assert [boolean(f" {word.upper()} ") for word in ("true", "t", "yes", "y", "1")] == [True] * 5
    assert [boolean(word) for word in ("False", "f", "no", "N", "0")] == [False] * 5
    with pytest.raises(ArgumentTypeError, match="'2' is not a boolean; write True or False"):
        boolean("2")


def test_a_boolean_flag_alone_is_true_and_with_a_word_what_it_says() -> None:
    assert typed("--use_prompt_extend").request.use_prompt_extend is True
    assert typed("--use_prompt_extend", "False").request.use_prompt_extend is False
    assert typed("--prompt_extend_optional").request.prompt_extend_optional is True
    assert typed("--t5_cpu").strategy.t5_cpu is True
    assert typed("--offload_model", "False").strategy.offload is False


@pytest.mark.parametrize(
    ("task", "flags", "values"),
    [
        ("t2v-14B", "--size 480p --frame_num 9 --sample_steps 7", {"size": "832*480", "frame_num": 9, "sample_steps": 7}),
        ("t2v-14B", "--sample_shift 2.5 --sample_guide_scale 4", {"sample_shift": 2.5, "sample_guide_scale": 4.0}),
        ("t2v-14B", "--sample_solver dpm++ --base_seed 5", {"sample_solver": "dpm++", "base_seed": 5}),
        ("t2v-14B", "--prompt cat --negative_prompt dog", {"prompt": "cat", "negative_prompt": "dog"}),
        ("i2v-14B", "--image a.png", {"image": "a.png"}),
        ("flf2v-14B", "--first_frame a.png --last_frame b.png", {"first_frame": "a.png", "last_frame": "b.png"}),
        ("vace-14B", "--src_video v --src_mask m --src_ref_images a,b", {"src_video": "v", "src_mask": "m", "src_ref_images": ("a", "b")}),
        ("t2v-14B", "--prompt_extend_method dashscope --prompt_extend_model m", {"prompt_extend_method": "dashscope"}),
        ("t2v-14B", "--prompt_extend_model m", {"prompt_extend_model": "m"}),
        ("t2v-14B", "--prompt_extend_target_lang en", {"prompt_extend_target_lang": "en"}),
    ],
)  # fmt: skip
def test_each_flag_of_a_request_is_its_field(task: str, flags: str, values: dict[str, Any]) -> None:
    request = typed("--task", task, *flags.split()).request
    assert {name: getattr(request, name) for name in values} == values
    assert request.task == task


def test_each_flag_of_a_knob_is_its_field_of_its_kind() -> None:
    words = "--load_strategy block --rows_per_chunk 99 --cfg joint --resident_blocks 3 --vae_tile 30 --attention flash --gpus 1"
    strategy = typed(*words.split()).strategy
    found = (strategy.load_strategy, strategy.rows_per_chunk, strategy.cfg, strategy.resident_blocks, strategy.vae_tile)
    assert found == ("block", 99, "joint", 3, 30)
    assert strategy.attention_backend == "flash"
    for wrong in (["--load_strategy", "lazy"], ["--vae_tile", "x"], ["--task", "t2v-2B"], ["--sample_solver", "euler"]):
        with pytest.raises(SystemExit):
            parsed(*wrong)


def test_without_a_flag_the_official_scripts_values_are_assumed_and_the_name_says_the_request() -> None:
    config = typed()
    assert (config.name, config.description) == ("t2v-14B-1280x720-81", "from command line flags")
    assert (config.device, config.weights, config.gpu, config.memory_limit_bytes) == ("auto", "random", None, None)
    assert (config.strategy.precision, config.strategy.load_strategy, config.strategy.offload) == (
        "fp16",
        "block",
        True,
    )
    assert typed(device="cpu").strategy.precision == "fp32"
    given = typed(device="cuda", weights="tiny", gpu="rtx4090", memory_limit_bytes=GIB)
    assert (given.device, given.weights, given.gpu, given.memory_limit_bytes) == ("cuda", "tiny", "rtx4090", GIB)


def test_a_fault_is_named_by_its_flag_and_of_a_file_by_its_section() -> None:
    assert refusal("--frame_num", "80").startswith("--frame_num: 80 is not of the form 4n+1")
    assert refusal("--resident_blocks", "99").startswith("--resident_blocks: 99")
    assert refusal("--gpus", "0").startswith("--gpus: 0 must be at least 1")
    assert refusal(weights="").startswith("--ckpt_dir: is empty")
    assert refusal("--size", "8k").startswith("--size: '8k' is not supported by t2v-14B; choose 720*1280")


# --- over a file -------------------------------------------------------------------------------------------------------------


def based(**given: Any) -> RunConfig:
    request = Request.for_task("i2v-14B", **({"size": "832*480", "prompt": "a", "image": "x.png"} | given))
    return RunConfig("file", "mine", "cuda", request, Strategy(vae_tile=30, cfg="joint"), weights="tiny", gpu="rtx4090")


def test_what_is_not_typed_is_what_the_file_says() -> None:
    base = based(base_seed=3)
    assert typed(base=base) == base
    path = Path("config.yaml")
    changed = typed("--vae_tile", "40", "--base_seed", "4", base=base, device="simulated", gpu="h200")
    assert (changed.strategy.vae_tile, changed.strategy.cfg, changed.request.base_seed) == (40, "joint", 4)
    assert (changed.device, changed.gpu, changed.weights, changed.name) == ("simulated", "h200", "tiny", "file")
    assert not path.exists()


def test_a_file_is_read_where_config_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(based().to_yaml(), encoding="utf-8")
    assert typed("--config", str(path)) == based()
    assert typed("--config", str(path), "--sample_steps", "3").request.sample_steps == 3


def test_another_task_or_size_brings_its_defaults_but_for_what_the_file_says_otherwise() -> None:
    plain = typed("--size", "720p", base=based())
    assert (plain.request.size, plain.request.sample_shift) == ("1280*720", 5.0)
    said = typed("--size", "720p", base=based(sample_shift=4.5, sample_steps=9))
    assert (said.request.sample_shift, said.request.sample_steps) == (4.5, 9)
    same = typed("--size", "832x480", base=based())
    assert same.request == based().request
    t2v = typed("--task", "t2v-14B", base=RunConfig("x", "", "auto", Request.for_task("i2v-14B", size="832*480")))
    assert (t2v.request.sample_steps, t2v.request.sample_shift) == (50, 5.0)
    assert t2v.request.negative_prompt == Request.for_task("t2v-14B").negative_prompt


def test_a_prompt_or_a_file_of_them_replaces_both_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("b\n\n c \n")
    several = typed("--prompt_file", str(path), base=based()).request
    assert (several.prompt, several.prompts) == ("", ("b", "c"))
    one = typed("--prompt", "d", base=based(prompt="", prompts=("b", "c"))).request
    assert (one.prompt, one.prompts) == ("d", ())
    assert typed(base=based(prompt="", prompts=("b", "c"))).request.prompts == ("b", "c")
    for content, said in (
        (b"a\0b", "is not text but binary; write one prompt per line"),
        (b" \n\n", "holds no prompt; write one per line"),
    ):
        path.write_bytes(content)
        assert refusal("--prompt_file", str(path)) == f"--prompt_file {path}: {said}"
    assert refusal("--prompt_file", str(tmp_path / "gone")).startswith("--prompt_file ")


# --- several GPUs ------------------------------------------------------------------------------------------------------------


def test_a_number_of_gpus_forgets_the_sizes_and_a_size_the_number() -> None:
    assert of_gpus({}) == {}
    assert of_gpus({"vae_tile": 30}) == {"vae_tile": 30}
    assert of_gpus({"parallel_degree": 4}) == {"ulysses_size": 1, "ring_size": 1, "cfg_size": 1, "parallel_degree": 4}
    assert of_gpus({"ring_size": 2}) == {"parallel_degree": 1, "ring_size": 2}
    both = {"parallel_degree": 2, "ring_size": 2}
    assert of_gpus(both) == {"ulysses_size": 1, "cfg_size": 1} | both


@pytest.mark.parametrize(
    ("size", "flags", "degree"),
    [("1", [], 1), ("2", [], 2), ("2", ["--gpus", "1"], 2), ("2", ["--gpus", "4"], 4), ("2", ["--cfg_size", "2"], 1)],
)
def test_torchrun_says_how_many_gpus_there_are_where_no_flag_does(
    size: str, flags: list[str], degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", size), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert typed(*flags).strategy.parallel_degree == degree


def sized(*flags: str, **strategy: int) -> tuple[int, int]:
    config = RunConfig("x", "", "auto", Request.for_task("t2v-14B"), Strategy(**strategy))  # type: ignore[arg-type]
    made = _with_free_sizes(config, parsed(*flags)).strategy
    return made.ulysses_size, made.parallel_degree


def test_sizes_that_nobody_said_are_free_where_the_number_of_gpus_is_given() -> None:
    both = {"parallel_degree": 2, "ulysses_size": 2}
    assert sized("--gpus", "2", **both) == (1, 2)
    assert sized("--gpus", "2", "--ulysses_size", "2", **both) == (2, 2)
    assert sized("--config", "x.yaml", **both) == (2, 2)
    assert sized(ulysses_size=2) == (2, 1)


# --- the budget that is asked for --------------------------------------------------------------------------------------------

TOTAL, AVAILABLE = 64 * GIB, 60 * GIB


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4090 with 20 GiB free, and 60 of 64 GiB of RAM."""
    card = SimpleNamespace(name="NVIDIA GeForce RTX 4090", memory=lambda: (20 * GIB, int(23.52 * GIB)))
    monkeypatch.setattr("wanvram.cli.budget.first_gpu", lambda: card)
    monkeypatch.setattr("wanvram.machine.host.total_ram_bytes", lambda: TOTAL)
    monkeypatch.setattr("wanvram.machine.host.available_ram_bytes", lambda: AVAILABLE)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise DeviceError("no CUDA device")

    monkeypatch.setattr("wanvram.cli.budget.first_gpu", none)


@pytest.mark.usefixtures("here")
def test_the_card_here_is_the_budgets_with_what_is_free_of_it_where_no_amount_is_stated() -> None:
    free = "20.00 GiB of the 23.52 GiB of the NVIDIA GeForce RTX 4090 are free now"
    for vram in (None, "auto", " AUTO "):
        budget = budget_of(vram, None, None)
        assert (budget.vram_bytes, budget.gpu, budget.notes) == (20 * GIB, "rtx4090", (free,))
        assert (budget.ram_bytes, budget.system) == (TOTAL, 8 * GIB), "4 GiB in use are less than the system's eighth"
    stated = budget_of("8GiB", "32GiB", None)
    assert (stated.vram_bytes, stated.ram_bytes, stated.system, stated.notes) == (8 * GIB, 32 * GIB, 4 * GIB, ())


@pytest.mark.usefixtures("here")
def test_ram_in_use_is_not_ours_where_the_run_follows_or_free_memory_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wanvram.machine.host.available_ram_bytes", lambda: 40 * GIB)
    kept = [
        budget_of(*given, None, None, now=now).system // GIB
        for given, now in (((None,), False), (("8GiB",), False), (("8GiB",), True))
    ]
    assert kept == [24, 8, 24]


@pytest.mark.usefixtures("here")
def test_a_named_card_is_another_machines_unless_it_is_the_one_here() -> None:
    other = budget_of(None, None, "rtx3060-12gb")
    assert (other.card.key, other.ram_bytes) == ("rtx3060-12gb", None)
    assert other.vram_bytes == other.card.total_bytes - GIB
    (note,) = other.notes
    assert note.startswith("of the ")
    assert note.endswith(" that the NVIDIA GeForce RTX 3060 12GB offers, 1.00 GiB are left to others, as to a desktop")
    same = budget_of("8GiB", None, "rtx4090")
    assert (same.ram_bytes, same.system) == (TOTAL, 8 * GIB)
    free = budget_of("auto", None, "rtx3060-12gb")
    assert (free.vram_bytes, free.card.key) == (20 * GIB, "rtx3060-12gb")


@pytest.mark.usefixtures("nowhere")
def test_without_a_card_here_one_is_named_or_the_fitting_ones_are_listed() -> None:
    assert budget_of("8GiB", None, "h200") == Budget(8 * GIB, gpu="h200")
    server = budget_of(None, None, "h200")
    assert server.vram_bytes == server.card.total_bytes - 3 * GIB // 10
    with pytest.raises(DeviceError):
        budget_of("auto", None, "h200")
    said = "no NVIDIA GPU answers here, and how long a run takes depends on the card: name it with --gpu "
    for vram, more in (
        ("8GiB", "(cards with 8.00 GiB: "),
        ("7777GiB", "(`wanvram check --cards` lists them)"),
        (None, "(`wanvram check"),
    ):
        with pytest.raises(InputError) as caught:
            budget_of(vram, None, None)
        assert str(caught.value).startswith(said + more)
    for vram, ram, said in (("8", None, "--vram_budget: 8 what?"), ("8GiB", "16", "--ram: 16 what?")):
        with pytest.raises(InputError, match=said.replace("?", r"\?")):
            budget_of(vram, ram, "h200", flag="vram_budget")


def test_a_budget_is_of_each_gpu_and_of_their_link() -> None:
    config = typed("--gpus", "2", "--cfg_size", "2", gpu="h200")
    found = budget_for(config, Budget(8 * GIB, gpu="h200"))
    assert (found.gpus, found.link) == (2, None)


# --- generate under a budget -------------------------------------------------------------------------------------------------


def under_budget(
    result: Any, *flags: str, record: Any = None, device: str = "simulated", gpu: str | None = None
) -> tuple[Any, list[Any]]:
    """What `planned` gives where the search ends with `result`, and what the search was given."""
    asked: list[Any] = []

    def plan_run(config: RunConfig, budget: Budget, *, offers: bool, show: Any) -> tuple[Any, Any]:
        assert callable(show)
        asked.extend((config, budget, offers))
        return result, record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_plan, "plan_run", plan_run)
        args = parsed("--vram_budget", "8GiB", *flags)
        try:
            return planned(typed(*flags, device=device, gpu=gpu), args), asked
        except BudgetError as error:
            return error, asked


@pytest.mark.usefixtures("nowhere")
def test_nothing_that_fits_is_a_budget_error_with_its_commands() -> None:
    request = Request.for_task("t2v-14B")
    refused = Refusal(request, Budget(8 * GIB), "device", "dit", 9 * GIB, (), "it does not fit", ("wanvram plan",))
    error, (_, budget, offers) = under_budget(refused)
    assert isinstance(error, BudgetError)
    assert (str(error), offers) == ("it does not fit", False)
    assert budget.card.key == "h200"
    assert budget.notes[-1] == "planned for the NVIDIA H200, the card that is simulated where --gpu names none"
    _, (_, named, _) = under_budget(refused, gpu="rtx3060-12gb")
    assert (named.card.key, named.notes) == ("rtx3060-12gb", ())
    _, (config, two, _) = under_budget(refused, "--gpus", "2")
    assert (two.gpus, config.strategy.parallel_degree, knobs.sizes_together(config.strategy)) == (2, 2, 1)


@pytest.mark.usefixtures("nowhere")
def test_what_the_plan_predicts_is_handed_to_the_run_with_the_time_until_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = plan(Request.for_task("t2v-14B"), Budget(8 * GIB, gpu="h200"), Options(offers=False), Card())
    elapsed: list[float] = []
    record = SimpleNamespace(prediction=lambda seconds: elapsed.append(seconds) or "predicted")
    (ready, prediction), _ = under_budget(made, record=record)
    assert (prediction, ready.memory_limit_bytes) == ("predicted", 8 * GIB)
    assert elapsed[0] > 0
    assert "wanvram generate --task t2v-14B" in capsys.readouterr().err
    (same, none), _ = under_budget(made)
    assert (same, none) == (ready, None)

"""Tasks against the official facts; configurations: every key, every refusal, round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from wanvram import specs
from wanvram.config import Request, RunConfig, Strategy, load_config
from wanvram.errors import InputError
from wanvram.tasks import TASKS, WAN21, latent_shape

TESTS = Path(__file__).parent.parent
FACTS = json.loads((TESTS / "golden" / "facts.json").read_text(encoding="utf-8"))
DEFAULTS = FACTS["generate_py"]["effective_defaults_per_task_and_size"]

# Adding a knob must change this list: every key is one more thing that a user has to understand.
KEYS = {
    "name",
    "description",
    "model_config.load_strategy",
    "model_config.precision",
    "model_config.offload",
    "model_config.t5_cpu",
    "model_config.device",
    "optimization.attention_slicing",
    "optimization.rows_per_chunk",
    "optimization.cfg",
    "optimization.weights_in",
    "optimization.resident_blocks",
    "optimization.attention_backend",
    "optimization.residual_in",
    "optimization.weight_storage",
    "optimization.product_precision",
    "optimization.vae_tile",
    "optimization.vae_precision",
    "optimization.expandable_segments",
    "optimization.gradient_checkpointing",
    "optimization.batch_size",
    "optimization.micro_batch_size",
    "optimization.cfg_size",
    "optimization.parallel_degree",
    "optimization.ulysses_size",
    "optimization.ring_size",
    "optimization.exchange_by",
    "optimization.t5_fsdp",
    "optimization.dit_fsdp",
    "logging.profile_memory",
    "logging.log_interval",
    "logging.trace",
    "logging.trace_path",
    "logging.snapshot",
    "logging.keep_every",
    "request.task",
    "request.size",
    "request.frame_num",
    "request.sample_steps",
    "request.sample_shift",
    "request.sample_guide_scale",
    "request.sample_solver",
    "request.base_seed",
    "request.prompt",
    "request.negative_prompt",
    "request.prompts",
    "request.image",
    "request.first_frame",
    "request.last_frame",
    "request.src_video",
    "request.src_mask",
    "request.src_ref_images",
    "request.use_prompt_extend",
    "request.prompt_extend_method",
    "request.prompt_extend_model",
    "request.prompt_extend_target_lang",
    "request.prompt_extend_optional",
    "request.weights",
    "request.gpu",
    "request.memory_limit_bytes",
    "request.link",
}

SPECIFICATION_EXAMPLE = """
name: "optimization_test_1"
description: "使用模型分块加载和注意力切片的优化配置"

model_config:
  load_strategy: "block"
  precision: "fp16"
  device: "cuda"
  offload: false

optimization:
  attention_slicing: true
  gradient_checkpointing: false
  batch_size: 1
  micro_batch_size: 1
  parallel_degree: 1

logging:
  profile_memory: true
  log_interval: 10
  trace_path: "traces/opt_test_1"
"""


def load(text: str, tmp_path: Path) -> RunConfig:
    path = tmp_path / "case.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_the_tasks_are_the_official_ones() -> None:
    assert set(TASKS) == set(FACTS["WAN_CONFIGS"])
    assert all(task.dit in specs.DIT for task in TASKS.values())


@pytest.mark.parametrize("name", TASKS)
def test_sizes_and_defaults_are_those_of_the_official_script(name: str) -> None:
    task = TASKS[name]
    assert set(task.sizes) == set(FACTS["SUPPORTED_SIZES"][name])
    assert {size for size, defaults in DEFAULTS[name].items() if defaults} == set(task.sizes)
    assert task.default_size in task.sizes
    for size in task.sizes:
        request = Request.for_task(name, size=size)
        assert {key: getattr(request, key) for key in DEFAULTS[name][size]} == DEFAULTS[name][size]
    assert task.negative_prompt == FACTS["default_negative_prompt"][name]


def test_the_default_size_is_the_official_one_where_the_task_supports_it() -> None:
    official = FACTS["generate_py"]["default_size"]
    for name, task in TASKS.items():
        assert (task.default_size == official) == (official in FACTS["SUPPORTED_SIZES"][name])


def test_frames_are_4n_plus_1_and_the_latent_follows() -> None:
    assert [n for n in range(-4, 14) if WAN21.geometry.are_frames_valid(n)] == [1, 5, 9, 13]
    assert latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert latent_shape(1, 1024, 1024) == (16, 1, 128, 128)


# --- configurations -------------------------------------------------------------------------------------------------


def test_the_keys_of_a_configuration_are_exactly_these() -> None:
    data = RunConfig("x", "", "auto", Request.for_task("t2v-1.3B")).to_dict()
    found: list[str] = []
    for key, value in data.items():
        found += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    assert set(found) == KEYS, "a new knob must be added here on purpose"


CONFIGS = [path for path in sorted((TESTS / "configs").glob("*.yaml")) if path.stem != "matrix"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_opens_with_its_question_loads_and_survives_a_round_trip(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# Question: ")
    config = load_config(path)
    assert config.name == path.stem, "the run directory is found by the file's name"
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict(), allow_unicode=True))) == config


def test_the_baseline_is_the_one_of_the_specification() -> None:
    config = load_config(TESTS / "configs" / "baseline.yaml")
    assert (config.request.task, config.request.size) == ("t2v-1.3B", "832*480")
    assert (config.request.frame_num, config.request.sample_steps) == (81, 50)
    assert (config.strategy.load_strategy, config.strategy.precision) == ("block", "fp16")
    assert config.strategy == Strategy(load_strategy="block", precision="fp16", micro_batch_size=1)


def test_memory_opt_differs_from_the_baseline_in_its_strategy_alone() -> None:
    baseline, optimized = (load_config(TESTS / "configs" / f"{name}.yaml") for name in ("baseline", "memory_opt"))
    assert optimized.request == baseline.request
    assert optimized.measurement == baseline.measurement
    assert optimized.strategy != baseline.strategy


def test_the_example_of_the_specification_loads_as_it_stands(tmp_path: Path) -> None:
    config = load(SPECIFICATION_EXAMPLE, tmp_path)
    assert (config.request.task, config.request.size) == ("t2v-14B", "1280*720")
    assert (config.device, config.measurement.trace_directory) == ("cuda", "traces/opt_test_1")
    assert config.strategy.attention_slicing


def test_gradient_checkpointing_is_accepted_and_says_that_it_has_no_effect(tmp_path: Path) -> None:
    config = load("name: x\noptimization: {gradient_checkpointing: true}", tmp_path)
    assert "no effect" in config.notes()[0]
    assert load("name: x", tmp_path).notes() == []


REFUSED: dict[str, tuple[str, ...]] = {
    "name: x\nmodel_config: {precison: bf16}": ("model_config.precison", "did you mean precision", "load_strategy"),
    "name: x\nprecision: bf16": ("precision: unknown key", "belongs under model_config"),
    "name: x\nmodle_config: {}": ("did you mean model_config",),
    "name: x\n7: y": ("7: unknown key",),
    "name: x\noptimization: {attention_slicing: 'true'}": ("optimization.attention_slicing", "true or false", "quotes"),
    "name: x\noptimization: {attention_slicing: 1}": ("optimization.attention_slicing: 1 is not true or false",),
    "name: x\nrequest: {sample_steps: true}": ("request.sample_steps: True is not a whole number",),
    "name: x\nrequest: {sample_steps: 4.5}": ("request.sample_steps: 4.5 is not a whole number",),
    "name: x\nrequest: {sample_steps: -3}": ("request.sample_steps: -3", "1..1000"),
    "name: x\nrequest: {sample_shift: .nan}": ("request.sample_shift: nan",),
    "name: x\nrequest: {sample_guide_scale: .inf}": ("request.sample_guide_scale: inf",),
    "name: x\nrequest: {sample_shift: 1.0e-50}": ("request.sample_shift: 1e-50 is outside 0.01..100",),
    "name: x\nrequest: {sample_guide_scale: -1.0e+300}": (
        "request.sample_guide_scale: -1e+300 is outside -1000..1000",
    ),
    f"name: x\nrequest: {{sample_guide_scale: {'9' * 400}}}": ("case.yaml", "line 2", "a number is too large"),
    f"name: x\nrequest: {{frame_num: 0x{'f' * 5000}}}": ("case.yaml", "line 2", "a number is too large"),
    'name: x\nrequest: {weights: "\\udcff"}': ("case.yaml", "line 2", "a text is no Unicode"),
    'name: x\nrequest: {weights: "\\UFFFFFFFF"}': ("case.yaml", "is not valid YAML"),
    "name: x\nrequest: {sample_solver: euler}": ("request.sample_solver: 'euler'", "unipc or dpm++"),
    "name: x\nrequest: {frame_num: 80}": ("request.frame_num: 80", "4n+1"),
    "name: x\nrequest: {task: t2i-14B, frame_num: 5}": ("request.frame_num", "must be 1"),
    "name: x\nrequest: {task: t2v-2B}": ("request.task: 't2v-2B'", "t2v-1.3B"),
    "name: x\nrequest: {task: t2v-1.3B, size: 1280*720}": ("request.size: '1280*720'", "480*832, 832*480"),
    "name: x\nrequest: {base_seed: -2}": ("request.base_seed: -2",),
    "name: x\nrequest: {memory_limit_bytes: -1}": ("request.memory_limit_bytes: -1", "at least 1"),
    "name: x\nrequest: {link: ethernet}": ("request.link: 'ethernet'", "choose one of nvlink"),
    "name: x\nrequest: {memory_limit_bytes: 8}": ("request.memory_limit_bytes: 8", "in bytes: 8 GiB are 8589934592"),
    "name: x\nrequest: {weights: ''}": ("request.weights", "checkpoint directory"),
    "name: x\nrequest: {prompt: 5}": ("request.prompt: 5 is not text",),
    "name: x\nmodel_config: {precision: int8}": ("model_config.precision: 'int8'", "fp32, fp16 or bf16"),
    "name: x\nmodel_config: {load_strategy: lazy}": ("model_config.load_strategy: 'lazy'", "full or block"),
    "name: x\nmodel_config: {device: tpu}": ("model_config.device: 'tpu'", "simulated"),
    "name: x\nmodel_config: {device: cpu, precision: fp16}": ("fp16 has no fast CPU kernels; use bf16 or fp32",),
    "name: x\nmodel_config: []": ("model_config: [] is not a section",),
    "name: x\noptimization: {parallel_degree: 4, ulysses_size: 2}": (
        "optimization.parallel_degree: 4",
        "are of another number",
    ),
    "name: x\noptimization: {ulysses_size: 41}": ("optimization.ulysses_size: 41 GPUs", "40 heads; give at most 40"),
    "name: x\noptimization: {cfg_size: 3}": ("optimization.cfg_size: 3 GPUs", "two guidance passes; give 1 or 2"),
    "name: x\noptimization: {ring_size: 0}": ("optimization.ring_size: 0", "at least 1"),
    "name: x\noptimization: {dit_fsdp: true}": ("optimization.dit_fsdp: true", "several GPUs"),
    "name: x\nmodel_config: {t5_cpu: true}\noptimization: {ulysses_size: 2, t5_fsdp: true}": (
        "optimization.t5_fsdp: true",
        "t5_cpu has T5 on the CPU; choose one of them",
    ),
    "name: x\noptimization: {batch_size: 0}": ("optimization.batch_size: 0", "must be at least 1"),
    "name: x\noptimization: {batch_size: 65}": ("optimization.batch_size: 65", "at most 64 videos in one run"),
    "name: x\noptimization: {micro_batch_size: 0}": ("optimization.micro_batch_size: 0", "must be at least 1"),
    "name: x\noptimization: {batch_size: 2, micro_batch_size: 3}": (
        "optimization.micro_batch_size: 3 videos",
        "give a batch_size of at least that many",
    ),
    "name: x\noptimization: {batch_size: 3}\nrequest: {prompts: [a, b]}": (
        "optimization.batch_size: 3, but there are 2 prompts; give at most that many",
    ),
    "name: x\noptimization: {batch_size: 2}\nrequest: {base_seed: 9223372036854775807}": (
        "request.base_seed: 9223372036854775807",
        "leaves no seed for 2 videos",
    ),
    "name: x\noptimization: {rows_per_chunk: 0}": ("optimization.rows_per_chunk: 0", "at least 1"),
    "name: x\nmodel_config: {load_strategy: block}\noptimization: {resident_blocks: 41}": (
        "optimization.resident_blocks: 41",
        "t2v-14B has 40 blocks",
    ),
    "name: x\noptimization: {cfg: batched}": ("optimization.cfg: 'batched'", "sequential or joint"),
    "name: x\nlogging: {keep_every: -1}": ("logging.keep_every: -1", "at least 0"),
    "name: x\nlogging: {log_interval: 0}": ("logging.log_interval: 0", "at least 1"),
    "name: x\nlogging: {trace_path: ../up}": ("logging.trace_path: '../up'", "leaves the run directory"),
    "name: x\nlogging: {trace_path: /etc}": ("logging.trace_path: '/etc'", "leaves the run directory"),
    "name: x\nlogging: {trace_path: 'a/../../b'}": ("logging.trace_path", "leaves the run directory"),
    "name: x\nlogging: {trace_path: 'C:\\x'}": ("logging.trace_path", "leaves the run directory"),
    "name: x\nlogging: {trace_path: ''}": ("logging.trace_path", "leaves the run directory"),
    "name: ../x": ("name: '../x'", "plain file name"),
    "name: ''": ("name: ''",),
    f"name: {'x' * 300}": ("name: is too long", "200"),
    "description: only": ("name: is missing",),
    "": ("not a mapping",),
    "- a list": ("not a mapping",),
    "name: x\nrequest: {": ("not valid YAML at line 2",),
    "name: x\nok: yes\n\tbad: tab": ("not valid YAML at line 3",),
    "name: x\nname: y": ("line 2", "'name' appears twice"),
    "name: x\nrequest: {size: 832*480, size: 480*832}": ("line 2", "'size' appears twice"),
    "a: &a [x, x]\nb: [*a, *a]\nname: x": ("line 2", "aliases are not allowed"),
    "name: !!python/object/apply:os.getcwd []": ("line 1", "could not determine a constructor"),
    "name: x\n? [a, b]\n: c": ("line 2", "a key must be plain text"),
    "name: x\nb\x07: 1": ("line 2", "control character"),
    "name: 2024-99-99": ("not valid YAML",),
    "[" * 5000: ("not valid YAML",),
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:60].encode("unicode_escape").decode())
def test_a_bad_configuration_is_one_sentence_with_file_key_and_what_is_allowed(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(text, tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "case.yaml"))
    for part in REFUSED[text]:
        assert part in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(("task", "weights", "blocks"), [("vace-14B", "random", 48), ("t2v-1.3B", "tiny", 99)])
def test_all_blocks_may_be_resident_and_a_tiny_transformer_means_all_by_any_number(
    task: str, weights: str, blocks: int
) -> None:
    strategy = Strategy(load_strategy="block", resident_blocks=blocks)
    assert RunConfig("x", "", "auto", Request.for_task(task), strategy, weights=weights).strategy == strategy


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "gone.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"gone\.yaml"):
        load_config(path)


def test_a_prompt_has_an_upper_length() -> None:
    with pytest.raises(InputError, match="at most 20000"):
        Request.for_task("t2v-1.3B", prompt="x" * 20_001)


def test_a_wrong_value_is_shown_shortened() -> None:
    data: Any = {"name": "x", "request": {"sample_steps": "y" * 5000}}
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict(data)
    assert len(str(caught.value)) < 250

"""The specification's sections 3 to 7, sentence by sentence: what can be run is run as it is printed, the rest is in NOT_RUN.

tests/data/specification.md is the requirement, verbatim. A test names with `says` the words of the sentences it is about; the last
test finds every sentence, row and code block that nobody names.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from checkpoints import TINY_SIZE, tiny_models, write_download
from wanvram import MemoryProfiler, MemoryTracker, setup_profiler
from wanvram.cli import generate
from wanvram.cli.main import main
from wanvram.config import load_config

ROOT = Path(__file__).parents[2]
SPECIFICATION = (ROOT / "tests" / "data" / "specification.md").read_text(encoding="utf-8")
FIRST, LAST = 3, 7  # the numbered sections that say what the program does
Test = TypeVar("Test", bound=Callable[..., None])

# Words of a sentence, and why it is not run here.
NOT_RUN = {
    "source /workspace/env/bin/activate": "the folder is the author's; the same line runs with an environment of the test's own",
    "安装依赖": "`make venv` installs from the network; CI does it before every run of the tests",
    "定义以下目录结构": "announces the tree, whose every line is looked for",
    "这些参数控制着视频生成的各个方面": "announces the list, whose every flag is given",
    "用于在多个 GPU 上对序列维度进行切分": "needs several GPUs; 1, the default, is given",
    "与 Ulysses 结合使用": "needs several GPUs; 1, the default, is given",
    "(Fully Sharded Data Parallel)": "needs several GPUs; False, the default, is given",
    "`--dit_fsdp` (bool)": "needs several GPUs; False, the default, is given",
    "该功能会使用大语言模型": "needs a language model of 15 GB; test_prompt_extension.py runs it with a small one",
    "该值越高，生成结果与提示词的关联性越强": "about pictures of the trained model, of which no test has weights",
    "步数越多，生成质量可能越高": "about pictures of the trained model, of which no test has weights",
    "在推理中，它的应用场景较少": "says that it may be of use; without gradients it has no effect, which a note says",
    "可能指的是一次性将整个模型加载到设备中": "the sentence guesses; `block` streams blocks, `full` loads the whole (docs/strategy.md)",
}
SAID: dict[str, str] = {}  # words of a sentence -> the test that runs it


def says(*words: str) -> Callable[[Test], Test]:
    def named(test: Test) -> Test:
        SAID.update(dict.fromkeys(words, test.__name__))
        return test

    return named


# --- the page ----------------------------------------------------------------------------------------------------------------


def blocks() -> list[tuple[str, str, str]]:
    """(section, language, text) of every code block. That of section 3.1.1 has lost its head: it begins after the last empty line."""
    found: list[tuple[str, str, str]] = []
    section, language, before, inside = "", None, [], []
    for line in SPECIFICATION.splitlines():
        heading = re.match(r"#+ ([\d.]+?)\.? ", line)
        if line.strip().startswith("```"):
            if language is None and line.strip() == "```" and before and section == "3.1.1":
                found.append((section, "python", "\n".join(before)))
            elif language is None:
                language, inside = line.strip().removeprefix("```"), []
            else:
                found.append((section, language, "\n".join(inside)))
                language = None
        elif language is not None:
            inside.append(line)
        elif heading:
            section = heading[1]
        before = [*before, line] if line.strip() else []
    return found


def block(section: str, number: int = 0) -> str:
    return [text for where, _, text in blocks() if where == section][number]


def chosen() -> str:
    """Sections 3 to 7."""
    starts = [m.start() for m in re.finditer(r"^## \d", SPECIFICATION, re.MULTILINE)]
    return SPECIFICATION[starts[FIRST - 1] : starts[LAST]]


def sentences() -> Iterator[str]:
    """Every sentence, list item, table row and line of a command outside other code blocks; a flag's lines begin with the flag."""
    text = chosen()
    for _, language, code in blocks():
        if language != "bash":
            text = text.replace(code, "")
    flag = ""
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith(("#", "```", "|---", "| 配置名称")):
            continue
        named = re.match(r"- (`--\w+`)", line)
        flag = named[1] if named else flag
        for sentence in re.split(r"(?<=。)", line):
            if re.search(r"\w", sentence):
                yield f"{flag} {sentence}" if flag and flag not in sentence else sentence


# --- 3.1: what is measured ---------------------------------------------------------------------------------------------------


def test_setup_profiler_has_the_printed_schedule_and_settings(tmp_path: Path) -> None:
    """Of the call only the end is printed; what is missing is `torch.profiler.profile(schedule=torch.profiler.schedule(wait=1,`."""
    head = "torch.profiler.profile(schedule=torch.profiler.schedule(wait=1,"
    printed = eval(head + block("3.1.1"), {"torch": torch, "log_dir": str(tmp_path / "printed")})
    ours = setup_profiler(str(tmp_path / "ours"))
    assert [ours.schedule(step) for step in range(12)] == [printed.schedule(step) for step in range(12)]
    for setting in ("record_shapes", "profile_memory", "with_stack"):
        assert getattr(ours, setting) is getattr(printed, setting) is True
    assert callable(ours.on_trace_ready)


@says(
    "为了更精确地分析显存使用情况", "**基础显存**：模型加载后", "**激活显存**：在模型前向传播过程中", "记录显存快照",
    "记录每个模型加载后的**增量显存**", "保存到 JSON 文件中",
)  # fmt: skip
def test_base_memory_of_every_model_and_activation_memory_of_every_step_are_events_in_json(work: Path) -> None:
    run = work / "profiler_logs" / "t2v_1.3B_480p_5s_baseline"
    record = json.loads((run / "record.json").read_text())
    events = {event["name"]: event for event in json.loads((run / "memory_events.json").read_text())}
    for component in record["components"]:
        assert component["base_bytes"] > 0
        assert component["activation_bytes"] > 0
    assert {f"load {c['name']}" for c in record["components"]} <= set(events)
    steps = [span for stage in record["stages"] if stage["name"] == "denoise" for span in stage["children"]]
    assert [step["name"] for step in steps] == ["step 0", "step 1"]
    assert all(step["activation_bytes"] > 0 for step in steps)


# --- 3.2: configurations -----------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> str:
    path = folder / "opt_test_1.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_yaml_runs_as_it_stands(tmp_path: Path) -> None:
    """It asks for the 14B model at 720P on CUDA: the flags put it on the simulated device, with tiny weights for the time it takes."""
    run = tmp_path / "run"
    flags = ["--device", "simulated", "--weights", "tiny", "-o", str(run)]
    assert main(["profile", written(tmp_path, block("3.2.1")), *flags]) == 0
    record = json.loads((run / "record.json").read_text())
    assert record["config"]["name"] == "optimization_test_1"
    assert (record["config"]["request"]["task"], record["config"]["request"]["size"]) == ("t2v-14B", "1280*720")
    assert record["peak"]["device_bytes"] > 2**30


TINY = "request: {task: t2v-1.3B, weights: tiny, size: 64*64, frame_num: 1, sample_steps: 2, base_seed: 1}\n"


def on_the_cpu(text: str) -> str:
    """Tiny, and in fp32: the CPU has no fast kernels in fp16."""
    return text.replace('"fp16"', '"fp32"').replace('"cuda"', '"cpu"') + "\n" + TINY


def test_its_trace_path_alone_gives_a_trace(tmp_path: Path) -> None:
    text = on_the_cpu(block("3.2.1"))
    assert "trace:" not in text
    assert main(["profile", written(tmp_path, text), "-o", str(tmp_path / "run")]) == 0
    (trace,) = (tmp_path / "run" / "traces" / "opt_test_1").iterdir()
    assert trace.samefile(tmp_path / "run" / "trace.json")


def test_the_yaml_runs_with_a_batch_of_two(tmp_path: Path) -> None:
    text = on_the_cpu(block("3.2.1")).replace("batch_size: 1", "batch_size: 2", 1)
    assert yaml.safe_load(text)["optimization"]["batch_size"] == 2
    assert main(["profile", written(tmp_path, text), "-o", str(tmp_path / "run")]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_the_yaml_runs_on_its_own_device(tmp_path: Path, batch: int) -> None:
    text = block("3.2.1").replace("batch_size: 1", f"batch_size: {batch}", 1) + "\n" + TINY
    assert main(["profile", written(tmp_path, text), "-o", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "trace.json").stat().st_size > 10_000


@says("| baseline | block | fp16 | 无 | 单卡 |")
def test_the_matrix_s_row_is_the_baseline_s_configuration() -> None:
    strategy = load_config(ROOT / "tests" / "configs" / "baseline.yaml").strategy
    assert (strategy.load_strategy, strategy.precision, strategy.parallel_degree) == ("block", "fp16", 1)
    assert not strategy.attention_slicing


# --- 4.1: the class ----------------------------------------------------------------------------------------------------------


def used_as_printed(profiler: Any) -> list[dict[str, Any]]:
    profiler.start_profiling()
    assert isinstance(profiler.profiler, torch.profiler.profile)
    step = profiler.profiler.step
    profiler.log_event("vae_load", {"base_memory": 0})
    profiler.log_event("forward", {"step": 3})
    profiler.log_event("plain")
    for _ in range(5):
        torch.ones(4) @ torch.ones(4)
        step()
    profiler.stop_profiling()
    return list(profiler.events)


def test_the_class_does_what_the_printed_one_does(tmp_path: Path) -> None:
    """The printed one is executed with our MemoryTracker and setup_profiler; its `save_events` is not printed."""
    names = {"torch": torch, "time": time, "MemoryTracker": MemoryTracker, "setup_profiler": setup_profiler}
    exec(block("4.1"), names)
    printed: Any = names["MemoryProfiler"]
    printed.save_events = lambda self: None
    for method in ("__init__", "start_profiling", "log_event", "stop_profiling"):
        theirs, ours = (inspect.signature(getattr(cls, method)).parameters for cls in (printed, MemoryProfiler))
        assert [*theirs] == [*ours][: len(theirs)]
    both = [used_as_printed(cls("baseline", str(tmp_path / cls.__module__))) for cls in (printed, MemoryProfiler)]
    for theirs, ours in zip(*both, strict=True):
        assert theirs.items() <= (ours | {key: theirs[key] for key in ("timestamp", "memory_log")}).items()
        assert theirs["memory_log"].split("=")[0] == ours["memory_log"].split("=")[0]
        assert re.fullmatch(r"\w+: \w+=-?\d+\.\d\d MB", ours["memory_log"])
    for cls in (printed, MemoryProfiler):
        folder = tmp_path / cls.__module__
        assert len(list(folder.glob("*.pt.trace.json"))) == 1
        assert (folder / "memory_log.json").exists()


# --- 4.2: the analysis -------------------------------------------------------------------------------------------------------


@says(
    "显存使用统计", "分析每个核心组件", "forward pass", "**总峰值显存**", "显存碎片率和波动情况", "阶段分析", "模型加载显存",
    "推理过程显存", "模型切换显存",
)  # fmt: skip
def test_analyze_says_what_the_list_asks_for(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = work / "profiler_logs" / "t2v-1.3B-fp32"
    assert main(["analyze", str(run)]) == 0
    text = capsys.readouterr().out
    for component in ("text_encoder", "vae", "dit"):
        assert re.search(rf"^{component} ", text, re.MULTILINE), "base memory of each"
    for moment in ("before the first forward pass", "inside the transformer (block 0)", "after vae.decode"):
        assert moment in text
    assert "The peak is in " in text
    for table in ("loading", "encode_text", "denoise", "decode"):
        assert re.search(rf"^{table}", text, re.MULTILINE)
    assert main(["analyze", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"fragmentation", "fluctuation", "switches"} <= set(re.findall(r'"(\w+)":', json.dumps(document)))


# --- 5: how it is run --------------------------------------------------------------------------------------------------------


@says("确保测试环境", "清理 GPU 进程", "预热 GPU", "检查 CUDA 版本")
def test_check_shows_the_cuda_version_warms_up_and_ends_only_what_uses_the_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check"]) == 0
    assert "CUDA" in capsys.readouterr().out
    assert main(["check", "--json"]) == 0
    assert "warm_up" in json.loads(capsys.readouterr().out)
    assert main(["check", "--terminate", str(os.getpid())]) == 2, "it uses no GPU"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both command blocks of section 5.2 typed in a copy of the repository, in an activated environment.

    Reduced: two of the configurations, with tiny weights on the CPU, where fp16 is bf16.
    """
    folder = tmp_path_factory.mktemp("work")
    (folder / "tests" / "configs").mkdir(parents=True)
    for name in ("tests/scripts", "Wan-Test", "src"):
        (folder / name).symlink_to(ROOT / name)
    small = {
        "size: .*": "size: 64*64\n  weights: tiny",
        "frame_num: .*": "frame_num: 1",
        "sample_steps: .*": "sample_steps: 2",
    }
    for name in ("t2v_1.3B_480p_5s_baseline", "t2v-1.3B-fp32"):
        text = (ROOT / "tests" / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        for key, value in (small | {"device: auto": "device: cpu", "precision: fp16": "precision: bf16"}).items():
            text = re.sub(rf"^  {key}", f"  {value}", text, flags=re.MULTILINE)
        (folder / "tests" / "configs" / f"{name}.yaml").write_text(text, encoding="utf-8")
    venv.create(folder / "env")
    for name, words in (("python", sys.executable), ("wanvram", f"{sys.executable} -m wanvram")):
        program = folder / "env" / "bin" / name
        program.unlink(missing_ok=True)
        program.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    commands = "set -e\n" + "\n".join(block("5.2", number) for number in (0, 1))
    commands = commands.replace("/workspace/env", shlex.quote(str(folder / "env")))
    typed = subprocess.run(["bash", "-c", commands], cwd=folder, capture_output=True, text=True, check=False)
    assert typed.returncode == 0, typed.stdout + typed.stderr
    (folder / "stdout.txt").write_text(typed.stdout, encoding="utf-8")
    return folder


@says(
    "**执行测试**", "在指定的虚拟环境下执行", "bash tests/scripts/run_memory_tests.sh",
    "数据分析", "python Wan-Test/analyze_trace_file.py", "工具准备", "配置日志目录", "准备测试数据",
)  # fmt: skip
def test_the_printed_commands_make_the_runs_and_analyze_the_trace(work: Path) -> None:
    """Nothing was prepared: the folder of logs is made, and weights and inputs need no download."""
    printed = (work / "stdout.txt").read_text(encoding="utf-8")
    assert {path.name for path in (work / "profiler_logs").iterdir() if path.is_dir()} == {
        "t2v_1.3B_480p_5s_baseline", "t2v-1.3B-fp32",
    }  # fmt: skip
    assert "2 run, 0 already done" in printed
    assert re.search(r"^trace\.json: [\d,]+ events", printed, re.MULTILINE)
    assert "ProfilerStep#2" in printed
    assert "operators by memory allocated" in printed


# --- 6: where everything is --------------------------------------------------------------------------------------------------


def test_every_line_of_the_printed_tree_is_there(work: Path) -> None:
    parents: list[str] = []
    found = []
    for line in block("6.1").splitlines()[1:]:
        depth, name = line.index("──") // 4, line.partition("── ")[2].partition("#")[0].strip()
        parents[depth:] = [name]
        found.append("/".join(part.strip("/") for part in parents))
    assert "profiler_logs/t2v-1.3B-fp32/memory_events.json" in found
    for path in found:
        if not path.startswith("..."):
            assert ((work if path.startswith("profiler_logs") else ROOT) / path).exists(), path


# --- 7: the flags ------------------------------------------------------------------------------------------------------------

FLAGS = dict(re.findall(r"^- `(--\w+)` (.*?)(?=^- `--|\Z)", chosen(), re.MULTILINE | re.DOTALL))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    generate.prepare_parser(made)
    return made


@pytest.mark.parametrize("flag", FLAGS)
def test_a_printed_flag_has_its_printed_choices_and_default(flag: str) -> None:
    text = FLAGS[flag]
    (action,) = [action for action in parser()._actions if flag in action.option_strings]
    choices = re.search(r"可选项: (.*?)。", text)
    for choice in re.findall(r"`([^`]+)`", choices[1]) if choices else ():
        assert getattr(parser().parse_args([flag, choice]), action.dest) == choice
    given = [["--task", task] for task in ("t2v-14B", "t2i-14B", "i2v-14B")]
    of_task = {"--frame_num": [81, 1, 81], "--sample_steps": [50, 50, 40]}
    default = re.search(r"默认值: (?:在单卡环境下为 )?`([^`]+)`", text)
    for task, words in enumerate(given):
        if default is None or (flag == "--task"):
            break
        config = generate._config(parser().parse_args([*words, "--ckpt_dir", "random"]), None)
        value = config_value(config, flag)
        expected = of_task[flag][task] if flag in of_task else yaml.safe_load(default[1])
        assert value == expected
    if flag == "--task":
        assert generate._config(parser().parse_args(["--ckpt_dir", "random"]), None).request.task == "t2v-14B"


def config_value(config: Any, flag: str) -> Any:
    name = {"--offload_model": "offload"}.get(flag, flag.removeprefix("--"))
    return getattr(config.strategy if hasattr(config.strategy, name) else config.request, name)


GIVEN = (
    f"--size {TINY_SIZE} --frame_num 5 --offload_model True --ulysses_size 1 --ring_size 1 --t5_fsdp False --dit_fsdp False "
    "--t5_cpu True --prompt cat --use_prompt_extend False --base_seed 1 --sample_solver dpm++ --sample_steps 2 --sample_shift 5.0 "
    "--sample_guide_scale 5.0 --precision fp32 --attention_slicing True --gradient_checkpointing True --load_strategy block"
)
MEDIA = {"t2v-1.3B": "", "i2v-14B": "--image a.png", "flf2v-14B": "--first_frame a.png --last_frame a.png"}


@says(*(f"`{flag}`" for flag in FLAGS))
@pytest.mark.parametrize("task", MEDIA)
def test_generate_py_takes_every_printed_flag_and_makes_a_video(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its value in one command; on the CPU, with tiny weights in official folders."""
    Image.fromarray(np.full((64, 96, 3), 99, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "DIR").mkdir()
    write_download(tmp_path / "DIR", "tiny-" + task.partition("-")[0])
    monkeypatch.chdir(tmp_path)
    words = f"--task {task} --ckpt_dir DIR {GIVEN} {MEDIA[task]}".split()
    monkeypatch.setattr(sys, "argv", ["generate.py", *words, "--device", "cpu", "-o", "run"])
    with tiny_models(), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "generate.py"), run_name="__main__")
    assert ended.value.code == 0
    assert len(list((tmp_path / "run").glob("video*.mp4"))) == 1
    given = {word for flags in (GIVEN, *MEDIA.values()) for word in flags.split() if word.startswith("--")}
    assert given | {"--task", "--ckpt_dir"} == set(FLAGS)


# --- whether that is all -----------------------------------------------------------------------------------------------------

RUN_BLOCKS = {"3.1.1", "3.2.1", "4.1", "5.2", "6.1"}


def test_every_sentence_and_code_block_of_sections_3_to_7_is_run_or_listed_with_its_reason() -> None:
    said = list(sentences())
    known = SAID.keys() | NOT_RUN.keys()
    assert [s for s in said if not any(words in s for words in known)] == []
    assert [words for words in known if not any(words in s for s in said)] == [], "the page no longer says this"
    numbers = {where for where, _, _ in blocks() if where and FIRST <= int(where.partition(".")[0]) <= LAST}
    assert numbers == RUN_BLOCKS
    assert len(said) > 90
    assert all(reason for reason in NOT_RUN.values())

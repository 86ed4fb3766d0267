"""Every example that a verb or a benchmark prints and every command of the documentation is run as a user would, on small models.

Collected from the pages, made small by the table SMALLER, run in a folder that has what the command names. A command that
cannot be run here fails; only those for a GPU (benchmarks) are checked to be understood instead.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from checkpoints import tiny_models, write_diffusers, write_download
from pipeline_folders import write_pipeline
from wanvram.cli import profile
from wanvram.cli.main import VERBS, main
from wanvram.foreign.measured import MeasuredDevice, MeasuredTable
from wanvram.matrix import runner
from wanvram.simulate.card import card_to_json
from wanvram.simulate.gpus import find_gpu

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "README.zh-CN.md", "tests/README.md", "benchmarks/README.md", "docs/*.md")
HEADS = ("wanvram", "python", "bash", "make", ".venv/bin/wanvram", ".venv/bin/python")

# What is changed so that a command takes seconds on 2 cores without a GPU: the first row that is found decides what is
# appended, in the words of the command line, where the last of two equal flags counts.
SMALLER: list[tuple[str, str]] = [
    (r"wanvram generate .*--config run\.yaml", ""),
    (r"wanvram generate .*--weights tiny", ""),
    (r"wanvram generate --resume", ""),
    (r"wanvram generate .*--weights random", "--device simulated --frame_num 5 --sample_steps 2"),
    (r"wanvram generate .*--config plan\.yaml", "--device simulated"),
    (r"wanvram generate .*--vram_budget", "--device simulated --size 96*64 --frame_num 5 --sample_steps 2"),
    (r"wanvram generate .*--precision fp16", "--device simulated --size 96*64 --frame_num 5 --sample_steps 2"),
    (r"wanvram generate --help", ""),
    (r"wanvram generate", "--device cpu --size 96*64 --frame_num 5 --sample_steps 2"),
    (r"wanvram estimate .*--config", ""),
    (r"wanvram estimate .*--diffusers", "--height 64 --width 64"),
    (r"wanvram estimate --task t2i", "--sample_steps 2"),
    (r"wanvram estimate", "--frame_num 5 --sample_steps 2"),
    (r"wanvram plan --longest", "--size 96*64 --sample_steps 2 --gpu h200 --vram 878MiB"),
    (r"wanvram plan", "--size 96*64 --frame_num 5 --sample_steps 2 --gpu h200"),
    (r"wanvram profile", "--device simulated"),
]
# And in the configurations of tests/configs.
SMALLER_YAML = {
    r"size: .*": "size: 128*80\n  weights: tiny",
    r"frame_num: .*": "frame_num: 5",
    r"sample_steps: .*": "sample_steps: 2",
    r"- {model_config.load_strategy: full, .*true}": "- {optimization.attention_slicing: true}\n  - {model_config.offload: false}",
}
# There is no card whose free memory `auto` could ask for; CONFIG and FLAGS stand for what a reader puts there.
INSTEAD = {
    "--vram auto": "--vram 8GiB",
    "--vram_budget auto": "--vram_budget 8GiB",
    " CONFIG": " tests/configs/baseline.yaml",
    " FLAGS": " --offload_model True",
}
# Exit codes other than 0: the page says that it does not fit; a condition is met or not; there is no process 4711.
CODES = {
    r"--load_strategy full --gpu rtx4090 --vram 24GiB": {3},
    r"--fail-if": {0, 1},
    r"--terminate 4711": {2},
    r"wanvram harvest": {1, 2},  # it measures the card, and there is none
    r"check --attention": {0, 1},  # it measures the card, and there is none
}
READERS = ("analyze", "report", "compare", "estimate")  # they are given the runs that they name; others begin without


# --- collected ---------------------------------------------------------------------------------------------------------------


def _of_help(text: str) -> Iterator[str]:
    """The indented lines under `examples:`; what stands behind two spaces is about the example."""
    lines = text.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    yield from (re.split(r" {2,}", line.strip())[0] for line in lines)


def _of_page(text: str) -> Iterator[str]:
    """Indented lines that begin with a command, and commands with arguments inside a sentence."""
    for line in text.splitlines():
        command = line.strip().removeprefix("$ ")
        if line.startswith("    ") and command.startswith(tuple(f"{head} " for head in HEADS)):
            command = re.sub(r"^(\S+ \w+) {2,6}(?! )", r"\1 ", command)  # verbs are padded to a column
            yield re.split(r" +# | +-> | {3,}", command)[0].strip()
        yield from re.findall(r"`((?:wanvram \w+|python \S+\.py|bash \S+\.sh) [^`]+)`", line)


def _commands() -> list[str]:
    modules = [import_module(f"wanvram.cli.{verb}") for verb in VERBS]
    found = [c for module in modules for c in _of_help(module.__doc__ or "")]
    for pattern in PAGES:
        for page in sorted(ROOT.glob(pattern)):
            found += _of_page(page.read_text(encoding="utf-8"))
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        told = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        found += [command for command in _of_page(told) if command.startswith("python benchmarks/")]
    return list(dict.fromkeys(command.removeprefix(".venv/bin/").replace("……", "...") for command in found))


COMMANDS = _commands()


def test_the_pages_are_read() -> None:
    assert set(VERBS) <= {command.split()[1] for command in COMMANDS if command.startswith("wanvram ")}
    assert {"python generate.py", "bash tests/scripts/run_memory_tests.sh"} <= {
        " ".join(c.split()[:2]) for c in COMMANDS
    }
    assert len(COMMANDS) > 60


# --- what the commands name ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once, linked or copied into each command's folder: checkpoints, a predicted and a traced run, a video."""
    folder = tmp_path_factory.mktemp("shelf")
    for kind in ("t2v", "i2v", "flf2v", "vace"):
        (folder / kind).mkdir()
        write_download(folder / kind, f"tiny-{kind}")
    (folder / "Diffusers").mkdir()
    write_diffusers(folder / "Diffusers", "tiny-i2v")
    small = {"task": "t2v-1.3B", "size": "128*80", "frame_num": 5, "sample_steps": 5, "base_seed": 1, "weights": "tiny"}
    for name, device, trace in (("predicted", "simulated", False), ("traced", "cpu", True)):
        document = {"name": name, "model_config": {"device": device}, "logging": {"trace": trace}, "request": small}
        (folder / "run.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        assert main(["profile", str(folder / "run.yaml"), "-o", str(folder / name)]) == 0
    shutil.copy(folder / "traced" / "trace.json", folder / "predicted" / "trace.json")
    viz = ["--config", str(folder / "predicted" / "config.yaml"), "--memory_viz"]
    assert main(["estimate", *viz, str(folder / "predicted" / "snapshot.pickle")]) == 0
    return folder


def _provide(word: str, command: str, shelf: Path) -> None:
    """A file or folder of that name, by its ending or by what the verb reads; nothing for a word that is no name."""
    verb, path = command.split()[1], Path(word)
    written = re.search(rf"-o {re.escape(word)}( |$)", command) is not None
    if written or path.exists() or word.startswith(("-", "/")) or ".." in word:
        return
    if path.suffix in (".jpg", ".png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 96, 3), 99, np.uint8)).save(path)
    elif word == "run.yaml":
        shutil.copy(shelf / "predicted" / "config.yaml", word)
        path.write_text(path.read_text(encoding="utf-8").replace("device: simulated", "device: cpu"), encoding="utf-8")
    elif f"--resume {word}" in command:  # killed before anything was kept
        path.mkdir(parents=True)
        text = (shelf / "predicted" / "config.yaml").read_text(encoding="utf-8")
        (path / "config.yaml").write_text(text.replace("device: simulated", "device: cpu"), encoding="utf-8")
    elif word == "my-4090.yaml":  # JSON is YAML
        path.write_text(json.dumps(card_to_json(find_gpu("rtx4090")) | {"key": "my-4090"}), encoding="utf-8")
    elif word == "prompts.txt":
        path.write_text("a cat\na dog\n", encoding="utf-8")
    elif verb in ("generate", "generate.py", "convert") and re.fullmatch(r"(\./)?(Wan2\.1-[\w.-]+|DIR)", word):
        os.symlink(shelf / _checkpoint_kind(command, word), path.name)
    elif verb in (*READERS, "Wan-Test/analyze_trace_file.py"):
        _provide_run(path, verb, shelf)


def _checkpoint_kind(command: str, folder: str) -> str:
    if folder.endswith("Diffusers"):
        return "Diffusers"
    task = re.search(r"--task (\w+)-", command) or re.search(r"Wan2\.1-([A-Z0-9]+)", folder)
    return task[1].lower() if task else "t2v"


def _provide_run(path: Path, verb: str, shelf: Path) -> None:
    if path.name == "expected.json":
        shutil.copy(shelf / "predicted" / "record.json", path)
    elif verb == "estimate" and path.name != "config.yaml":
        return  # what it writes
    else:
        top = path.parent if path.suffix else path
        shutil.copytree(shelf / "predicted", top, dirs_exist_ok=True)
        if top == Path("profiler_logs"):
            for name in ("baseline", "memory_opt"):
                shutil.copytree(shelf / "predicted", top / name)


# --- run ---------------------------------------------------------------------------------------------------------------------


class InProcess:
    """In place of a process of its own for each run of a series, which takes 3 s to start; test_matrix_commands has real ones."""

    def __init__(self, command: list[str], stdout: Any, **_: object) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            self.returncode = main(command[command.index("wanvram") + 1 :])
        stdout.write(printed.getvalue().encode())

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode

    poll = wait


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder with the repository's configurations and scripts, and tiny models behind every task."""
    (tmp_path / "tests").mkdir()
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / "tests" / name, tmp_path / "tests" / name)
    for path in (tmp_path / "tests" / "configs").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for pattern, small in SMALLER_YAML.items():
            text = re.sub(rf"^  {pattern}", f"  {small}", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    write_pipeline(tmp_path / "Wan-Diffusers")
    MeasuredTable(MeasuredDevice("NVIDIA H200", (9, 0), 132, "2.11.0", 91900), ()).write(tmp_path / "h200.json")
    for name in ("script.py", "my_pipeline.py", "flux.py"):  # what is simulated
        (tmp_path / name).write_text("import torch\ntorch.nn.Linear(64, 64).cuda()\n", encoding="utf-8")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(**(vars(subprocess) | {"Popen": InProcess})))
    monkeypatch.setattr(profile, "die_with_parent", lambda _: None)


def _small(command: str) -> str:
    for words, others in INSTEAD.items():
        command = command.replace(words, others)
    if "generate" in command:  # which the CPU does here, without a GPU's kernels
        command = re.sub(r" --attention (cudnn|flash|fa4)\b", "", command)
    compared = command.replace("python generate.py", "wanvram generate")
    return f"{command} {next((more for pattern, more in SMALLER if re.match(pattern, compared)), '')}"


def _words(command: str, shelf: Path) -> list[str]:
    """As a shell splits the command, with files in place of what is missing."""
    words = []
    for word in shlex.split(command):
        for piece in word.split(","):
            _provide(piece, command, shelf)
        found = sorted(map(str, Path().glob(word))) if "*" in word and "/" in word else []
        words += found or [word]
    return words


def _run_verb(words: list[str]) -> int:
    models = tiny_models() if words[0] in ("generate", "convert", "plan") else contextlib.nullcontext()
    try:
        with models:
            return main(words)
    except SystemExit as ended:  # --help
        return int(ended.code or 0)


def _run_script(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch, tiny_models():
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def _understood(words: list[str]) -> int:
    """For a GPU, or long: a benchmark's arguments are parsed, and then it ends."""
    if "argparse" not in (ROOT / words[0]).read_text(encoding="utf-8"):
        return 0

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(*arguments: Any) -> None:
        parse(*arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except Parsed:
            return 0
        except SystemExit as ended:
            return int(ended.code or 0)
    raise AssertionError(f"{words[0]} parsed no arguments")


def _run_bash(words: list[str]) -> int:
    """The script really, with a `wanvram` that keeps what it is given; then that."""
    stub = Path(".venv/bin/wanvram")
    stub.parent.mkdir(parents=True)
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > given.txt\n', encoding="utf-8")
    stub.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    assert subprocess.call(["bash", *words], env=plain) == 0
    given = Path("given.txt").read_text(encoding="utf-8").splitlines()
    return _run_verb([*given, *(() if "--device" in given else ("--device", "simulated"))])


def _run_shell(command: str) -> int:
    """A pipe, by the shell; `wanvram` and `python3` are those of this test."""
    here = Path("bin")
    here.mkdir()
    for name, words in (("wanvram", f"{sys.executable} -m wanvram"), ("python3", sys.executable)):
        (here / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        (here / name).chmod(0o755)
    path = os.pathsep.join((str(here.absolute()), os.environ["PATH"]))
    return subprocess.call(["bash", "-o", "pipefail", "-c", command], env=os.environ | {"PATH": path})


def _run_pytest(words: list[str]) -> int:
    """Not inside itself: its folders exist."""
    return 0 if all((ROOT / word).exists() for word in words if "/" in word) else 2


def _run_pip(words: list[str]) -> int:
    """Not here, where it is installed: this folder is a package, and the extras exist."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"\[(\w+)\]", " ".join(words))
    return 0 if "[project]" in project and all(re.search(rf"^{e} = ", project, re.MULTILINE) for e in extras) else 2


def _run_make(words: list[str]) -> int:
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    return 0 if re.search(rf"^{words[0]}:", targets, re.MULTILINE) else 2


def _handler(words: list[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    head, first = words[0], words[1]
    if head == "wanvram":
        return _run_verb, words[1:]
    if head in ("bash", "make"):
        return (_run_bash if head == "bash" else _run_make), words[1:]
    if first == "-m" and words[2] == "pytest":
        return _run_pytest, words[3:]
    if first == "-m" and words[2:4] == ["pip", "install"]:
        return _run_pip, words[4:]
    assert first.endswith(".py"), f"nobody knows how to run {words}"
    return (_understood if first.startswith("benchmarks/") else _run_script), words[1:]


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.sub(r"[^\w.-]+", " ", command))
def test_the_command_does_what_the_page_says(command: str, shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = next((codes for pattern, codes in CODES.items() if re.search(pattern, command)), {0})
    if " | " in command:
        assert _run_shell(command) in expected
        return
    for part in command.split(" && "):
        run, words = _handler(_words(_small(part), shelf))
        assert run(words) in expected, capsys.readouterr().err

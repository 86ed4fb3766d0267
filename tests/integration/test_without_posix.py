"""Every verb that needs no GPU starts where there is no POSIX, as on native Windows: in processes without what Windows lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from checkpoints import write_download
from wanvram import folder_lock
from wanvram.cli.main import VERBS, main
from wanvram.errors import InputError
from wanvram.matrix import runner

TINY = ["--task", "t2v-1.3B", "--size", "832*480", "--frame_num", "5", "--sample_steps", "2", "--base_seed", "1"]

# Libraries have their own Windows builds, so they are imported before. os.name stays: pathlib would make paths of Windows.
AS_ON_WINDOWS = """
import importlib, json, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
import mmap, os, signal
MISSING = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "readline", "syslog"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in MISSING:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())
for name in ("fork", "getuid", "geteuid", "getgid", "getloadavg", "getpgid", "killpg", "setsid", "nice", "pread", "pwrite",
             "posix_fadvise", "posix_fallocate", "sched_getaffinity", "mkfifo", "O_DIRECT", "O_DIRECTORY"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGQUIT", "setitimer", "alarm", "pthread_sigmask"):
    delattr(signal, name)
for name in [name for name in dir(mmap) if name.startswith(("MAP_", "MADV_", "PROT_"))]:
    delattr(mmap, name)
sys.platform = "win32"
import types
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda handle, mode, count: None)
from wanvram.cli.main import main
for arguments in json.loads(sys.argv[2]):
    try:
        code = main(arguments)
    except SystemExit as ended:  # --help
        code = ended.code
    if code:
        sys.exit(code)
"""
PLAIN = "argparse,ctypes,json,multiprocessing,pathlib,psutil,rich.live,rich.progress,subprocess,tempfile,yaml"
COMPUTING = (
    PLAIN
    + ",torch,torch._dynamo,numpy,av,PIL.Image,safetensors.torch,tokenizers,ftfy,pynvml,torch.utils._python_dispatch"
)


def as_on_windows(*commands: Sequence[str], libraries: str = PLAIN, folder: Path | None = None) -> str:
    """What the commands print, one after the other in one process, on a console that is not Unicode."""
    result = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, libraries, json.dumps(commands)],
        capture_output=True,
        encoding="cp1252",
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        cwd=folder,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("predicted") / "run"
    assert main(["estimate", *TINY, "-o", str(directory)]) == 0
    return directory


def test_the_command_and_every_verb_print_their_help() -> None:
    verbs = list(VERBS)
    printed = as_on_windows([], ["--help"], *([verb, "--help"] for verb in verbs))
    assert printed.count("examples:") == len(verbs)
    assert all(f"usage: wanvram {verb} " in printed for verb in verbs)


def test_estimate_predicts_and_writes_the_same_run(run: Path, tmp_path: Path) -> None:
    as_on_windows(["estimate", *TINY, "-o", str(tmp_path / "run")], libraries=COMPUTING)
    for name in ("timeline.json", "config.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    events = [json.loads((place / "memory_events.json").read_bytes()) for place in (tmp_path / "run", run)]
    first, second = ([event["memory_log"] for event in log] for log in events)
    assert first == second


def test_plan_finds_a_strategy() -> None:
    assert "Fits in" in as_on_windows(["plan", *TINY, "--vram", "8GiB", "--gpu", "rtx4060"], libraries=COMPUTING)


def test_analyze_report_and_compare_read_runs(run: Path, tmp_path: Path) -> None:
    printed = as_on_windows(
        ["analyze", str(run)],
        ["report", str(run), "-o", str(tmp_path / "r.html")],
        ["report", str(run), "--format", "md", "--lang", "zh"],
        ["compare", str(run), str(run)],
    )
    assert "The peak is in" in printed
    assert "Wrote " in printed
    assert "\\u663e\\u5b58" in printed, "what cp1252 lacks is printed as its escape"
    assert "peak, MiB" in printed


def test_convert_rewrites_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    write_download(tmp_path / "tiny", "tiny-t2v")
    flags = ["--precision", "bf16", "-o", "converted", "--verify"]
    assert "Wrote converted" in as_on_windows(["convert", "tiny", *flags], libraries=COMPUTING, folder=tmp_path)


def test_check_looks_at_the_machine() -> None:
    document = json.loads(as_on_windows(["check", "--json"], libraries=COMPUTING))
    assert document["host"]["load_average"] >= 0


def test_a_folder_is_locked_by_a_byte_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """msvcrt.locking as documented: a byte of an open file, EACCES if somebody has it."""
    held: set[str] = set()

    def locking(handle: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        path = os.readlink(f"/proc/self/fd/{handle}") if sys.platform == "linux" else "the only one"
        if path in held:
            raise PermissionError(13, "Permission denied")
        held.add(path)

    msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)  # type: ignore[arg-type]
    first = folder_lock._locked_file(tmp_path / folder_lock.LOCK_FILE)
    with pytest.raises(BlockingIOError):
        folder_lock._locked_file(tmp_path / folder_lock.LOCK_FILE)
    os.close(first)
    monkeypatch.setattr(
        folder_lock, "lock_folder", lambda folder: folder_lock._locked_file(folder / folder_lock.LOCK_FILE)
    )
    with pytest.raises(InputError, match="another wanvram profile is writing to"), runner._only_one_in({tmp_path}):
        pass

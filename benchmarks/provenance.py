"""Where a result comes from: code, machine, and the environment in which a command is typed; how a judgement ends a script."""

from __future__ import annotations

import atexit
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "ROOT",
    "ResultFile",
    "attended",
    "circumstances",
    "conclude",
    "environment_of_a_person",
    "header",
    "prediction_of",
    "read_record",
    "rows_of_a_process",
    "say_row",
    "steady_step",
    "unused",
]

ROOT = Path(__file__).parent.parent


def circumstances(*scripts: str) -> dict[str, Any]:
    """Of a result file: the code (the package and these scripts), versions and the machine, with the speed of its processor."""
    from wanvram.machine.host import operation_us

    return {
        "commit": _commit(),
        "source_sha256": _source_sha256(scripts),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "operation_us": operation_us(),
        "ram_bytes": psutil.virtual_memory().total,
        "ram_available_bytes": psutil.virtual_memory().available,
    }


def header(*scripts: str) -> dict[str, Any]:
    """Date, card with driver, clock and power as they are now (None without one), code, versions and machine."""
    import pynvml
    from nvml_watch import gpu_facts, gpu_of

    try:
        pynvml.nvmlInit()
        gpu = gpu_facts(pynvml, gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES")))
    except (pynvml.NVMLError, ValueError):  # none here, or none that this process may see
        gpu = None
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(), "gpu": gpu, **circumstances(*scripts)}


def attended(config: dict[str, Any], backend: str | None) -> dict[str, Any]:
    """A configuration with the backend of attention that a run took; None: what PyTorch chooses."""
    if backend is None:
        return config
    return config | {"optimization": config.get("optimization", {}) | {"attention_backend": backend}}


def unused(path: Path) -> Path:
    """The path, or with _2, _3 and so on behind its name where a result of the same day is already there. The file is made at once,
    empty: of two scripts side by side, which write at the end, one lost a row. One that is still empty at the end goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        free = path if number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")
        with suppress(FileExistsError):
            free.touch(exist_ok=False)
            atexit.register(_drop_if_empty, free)
            return free
    raise AssertionError("there is always a number")


def _drop_if_empty(path: Path) -> None:
    if path.exists() and path.stat().st_size == 0:
        path.unlink()


def _commit() -> str | None:
    """With `-dirty` where files differ from it; None outside a repository: the hash of the source says what ran."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _source_sha256(scripts: tuple[str, ...]) -> str:
    package = (path for path in (ROOT / "src/wanvram").rglob("*") if path.suffix in (".py", ".json"))
    digest = hashlib.sha256()
    for path in sorted([*package, *(ROOT / "benchmarks" / name for name in scripts)]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment_of_a_person(gpu: str | None = None, **more: str) -> dict[str, str]:
    """This process's variables, with a PYTHONPATH that holds in any directory; gpu: the only one that the command sees."""
    env = dict(os.environ) | more
    if "PYTHONPATH" in env:
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in env["PYTHONPATH"].split(os.pathsep))
    return env if gpu is None else env | {"CUDA_VISIBLE_DEVICES": gpu}


def read_record(directory: Path) -> dict[str, Any] | None:
    """record.json of a run directory; None where the command did not get that far."""
    try:
        return dict(json.loads((directory / "record.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def prediction_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the program had predicted of this run, `device_bytes` and `seconds`; empty where its record does not say."""
    for name in ("predicted", "prediction"):
        if isinstance(record.get(name), dict):
            return dict(record[name])
    return {}


def steady_step(record: dict[str, Any]) -> float | None:
    """Mean seconds of a denoising step without the first, which compiles and warms up; None where no other was timed."""
    children: list[Any] = next((s["children"] for s in record["stages"] if s["name"] == "denoise"), [])
    steps = [s for s in children if s["kind"] == "step"]
    timed = [(s["seconds"], s["repeats"]) for s in steps[1:] if s["seconds"] is not None]
    return sum(s * n for s, n in timed) / sum(n for _, n in timed) if timed else None


class ResultFile:
    """A JSON document that is whole on the disk after every row, whatever ends the process."""

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        summarize: Callable[[list[dict[str, Any]]], dict[str, Any]],
        made: list[dict[str, Any]] | None = None,
    ) -> None:
        """made: the rows of an earlier run that this one goes on with."""
        self.path = path
        self.header = header
        self.rows = list(made or [])
        self._summarize = summarize
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def append(self, row: dict[str, Any]) -> None:
        with self._lock:
            self.rows.append(row)
            self.write()

    def write(self) -> None:
        waiting = self.path.with_name(self.path.name + ".part")
        document = self.header | {"summary": self._summarize(self.rows), "rows": self.rows}
        waiting.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(waiting, self.path)


def conclude(summary: dict[str, Any]) -> int:
    """Prints what a judge found; the exit status of the script: 1 when a bound is broken."""
    print(json.dumps({name: value for name, value in summary.items() if name != "breaches"}))
    for breach in summary["breaches"]:
        print(f"BROKEN {breach}")
    return 1 if summary["breaches"] else 0


def rows_of_a_process(script: str, part: str) -> Iterator[dict[str, Any]]:
    """What `script --here part` says in a fresh process, in lines of `ROW ` and JSON (`say_row`). SystemExit if it fails."""
    with subprocess.Popen([sys.executable, script, "--here", part], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                yield json.loads(line[4:])
    if process.returncode:
        raise SystemExit(f"{part}: the process failed with exit code {process.returncode}")


def say_row(row: Mapping[str, Any]) -> None:
    print("ROW " + json.dumps(row), flush=True)

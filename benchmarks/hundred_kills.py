"""Kills at random moments: what was recorded is whole, nothing is left behind, and the same command leads to the same result.

    python benchmarks/hundred_kills.py --count 100 --lanes 8 --seed 1 --minutes 6 --out benchmarks/DATE_kills.json

KILL, TERM, HUP and INT in equal shares, to `profile`, a series of three, `convert` and `generate`, all tiny and on the CPU; no GPU, no
network. After --minutes no kill is begun any more, and the same command makes those that the file lacks. Exit code 1 on any failure, 3
where some are left to make.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from provenance import ROOT, ResultFile, circumstances, conclude

__all__ = ["OPERATIONS", "SIGNALS", "Scene", "kill_once", "rows_made", "signals_as_usual"]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
OPERATIONS = ("profile", "series", "convert", "generate")
WANVRAM = [sys.executable, "-m", "wanvram"]
TIMEOUT_S = 300.0
GONE_S = 15.0  # until the processes of a killed one have ended
REQUEST = "{task: t2v-1.3B, size: 832*480, frame_num: 5, sample_steps: 2, base_seed: 1, weights: tiny}"
CONFIG = (
    f"name: tiny\nmodel_config: {{precision: fp32, device: cpu}}\nrequest: {REQUEST.replace('832*480', '128*80')}\n"
)
MATRIX = f"""
base:
  name: tiny
  model_config: {{device: simulated, load_strategy: block}}
  request: {REQUEST}
axes:
  model_config.offload: [false, true]
include:
  - {{name: tiny-long, request.frame_num: 9}}
"""


@dataclass(frozen=True)
class Undisturbed:
    result: dict[str, Any]
    seconds: float
    begins: float  # seconds until the directory was there


class Scene:
    """The inputs of all operations, and what each leads to when nothing disturbs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "one.yaml").write_text(CONFIG)
        (folder / "three.yaml").write_text(MATRIX)
        _write_checkpoint(folder / "checkpoint")
        self._undisturbed: dict[str, Undisturbed] = {}

    def command(self, operation: str, out: Path) -> list[str]:
        given = {
            "profile": ["profile", str(self.folder / "one.yaml")],
            "series": ["profile", str(self.folder / "three.yaml")],
            "convert": ["convert", str(self.folder / "checkpoint"), "--precision", "bf16"],
            "generate": [
                "generate",
                "--weights",
                "tiny",
                "--prompt",
                "a cat",
                "--base_seed",
                "1",
                "--sample_steps",
                "6",
            ],
        }
        return [*WANVRAM, *given[operation], "-o", str(out)]

    def undisturbed(self, operation: str) -> Undisturbed:
        if operation not in self._undisturbed:
            place = self.folder / f"undisturbed-{operation}"
            start = time.monotonic()
            process = _start(self.command(operation, place / "out"), place)
            begins = _await_directory(process, place / "out") - start
            _, said = process.communicate(timeout=TIMEOUT_S)
            if process.returncode != 0:
                raise RuntimeError(f"{operation} fails undisturbed: {said.decode(errors='replace')[-2000:]}")
            self._undisturbed[operation] = Undisturbed(
                result_of(operation, place / "out"), time.monotonic() - start, begins
            )
        return self._undisturbed[operation]


def _write_checkpoint(folder: Path) -> None:
    sys.path[:0] = [entry for entry in (str(ROOT / "src"), str(ROOT / "tests")) if entry not in sys.path]
    from checkpoints import write_download

    folder.mkdir()
    write_download(folder, "tiny-t2v", sharded=True)


@contextmanager
def signals_as_usual() -> Iterator[None]:
    """A child would inherit that a background job ignores SIGINT and nohup SIGHUP; what has a handler starts as usual."""
    before = {number: signal.getsignal(number) for number in SIGNALS[1:]}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: list[str], place: Path) -> subprocess.Popen[bytes]:
    (place / "scratch").mkdir(parents=True, exist_ok=True)
    env = os.environ | {"TMPDIR": str(place / "scratch"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, cwd=place
    )


def _await_directory(process: subprocess.Popen[bytes], out: Path) -> float:
    while process.poll() is None and not out.exists():
        time.sleep(0.005)
    return time.monotonic()


# --- results -----------------------------------------------------------------------------------------------------------


def result_of(operation: str, out: Path) -> dict[str, Any]:
    """What two runs of the same command have in common: frames, bytes of a checkpoint, keys of records, names of events."""
    if operation == "convert":
        manifest = json.loads((out / "wanvram.json").read_text())  # in another order when it goes on
        return {path.relative_to(out).as_posix(): _sha256(path) for path in _files(out)} | {"wanvram.json": manifest}
    runs = sorted(path.parent for path in out.rglob("record.json"))
    result: dict[str, Any] = {str(run.relative_to(out)): _run_result(run) for run in runs}
    return result | {"files": [path.relative_to(out).as_posix() for path in _files(out)]}


def _run_result(run: Path) -> dict[str, Any]:
    record = json.loads((run / "record.json").read_text())
    for gpu in record["environment"].get("checks", {}).get("gpus", ()):  # none of a run that ended before it looked
        del gpu["processes"]  # other programs', which come and go
    return {
        "keys": sorted(set(_keys(record, ""))),
        "failure": record["failure"],
        "stages": [stage["name"] for stage in record["stages"]],
        "events": [event["name"] for event in json.loads((run / "memory_events.json").read_text())],
        "video": [_sha256(path) for path in sorted(run.glob("video*.mp4"))],
    }


def _keys(value: Any, above: str) -> Iterator[str]:
    """Dotted; the members of a list have one place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{above}.{key}"
            yield from _keys(item, f"{above}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item, f"{above}[]")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- one kill ----------------------------------------------------------------------------------------------------------


def kill_once(scene: Scene, operation: str, number: signal.Signals, rng: random.Random, place: Path) -> dict[str, Any]:
    """A row of the result: what was done, when, and `wrong`, which is empty if all is as it should be."""
    usual, out = scene.undisturbed(operation), place / "out"
    process = _start(scene.command(operation, out), place)
    start = time.monotonic()
    if rng.random() < 0.7:  # while it works; else at any moment, that of the imports included
        start = _await_directory(process, out)
        wait = rng.uniform(0, max(0.05, usual.seconds - usual.begins))
    else:
        wait = rng.uniform(0, usual.seconds)
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, start + wait - time.monotonic()))
    children = _children(process)
    before = {path: _count_events(path) for path in out.rglob("memory_events.json")}
    has_begun = out.exists() and process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=TIMEOUT_S)
    row: dict[str, Any] = {
        "operation": operation,
        "signal": number.name,
        "after_s": round(wait, 3),
        "code": process.returncode,
    }
    row["events"] = sum(before.values())
    wrong = _left_behind(number, place, children)
    # -number: before the program listens or after all is written, while the interpreter ends.
    if has_begun and number != signal.SIGKILL and process.returncode not in (0, 1, -number):
        wrong.append(f"exit code {process.returncode}")
    wrong += _recorded(operation, number, process.returncode, out, before)
    if b"Traceback" in said:
        wrong.append(f"a traceback: {said.decode(errors='replace')[-600:]}")
    wrong += _again(scene, operation, place, usual)
    return row | {"wrong": wrong}


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.Error:
        return []


def _count_events(path: Path) -> int:
    """Of a file that is being written."""
    return path.read_text().count('"timestamp"')


def _left_behind(number: signal.Signals, place: Path, children: list[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs(children, timeout=GONE_S)
    wrong = [f"process {child.pid} goes on" for child in alive]
    # torch makes its own folder of caches there, which stays.
    scratch = [path.name for path in (place / "scratch").iterdir() if not path.name.startswith("torchinductor_")]
    # Nobody can tidy up after SIGKILL.
    return wrong + ([f"left in the scratch folder: {scratch}"] if scratch and number != signal.SIGKILL else [])


def _recorded(operation: str, number: signal.Signals, code: int, out: Path, before: dict[Path, int]) -> list[str]:
    wrong = []
    for path, count in before.items():
        try:
            events = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            wrong.append(f"{path.relative_to(out)} cannot be read: {error}")
            continue
        if len(events) < count:
            wrong.append(f"{path.relative_to(out)}: {len(events)} events of {count}")
    if number == signal.SIGKILL:
        return wrong + ([] if code in (0, -number) else [f"exit code {code}"])
    if code not in (0, 1, -number):
        wrong.append(f"exit code {code} before there was a directory")
    for path in before:
        record = _read(path.with_name("record.json"))
        kind = (record or {}).get("failure") and record["failure"]["kind"]  # type: ignore[index]
        if record is None:
            wrong.append(f"{path.parent.relative_to(out)} has no record")
        elif kind not in (None, "interrupted") or (operation != "series" and (kind is None) != (code in (0, -number))):
            wrong.append(f"exit code {code} with a record of the failure {kind}")
    return wrong


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _again(scene: Scene, operation: str, place: Path, usual: Undisturbed) -> list[str]:
    """A series and a conversion go on; one run is begun again, in the same directory by --force."""
    out = place / "out"
    has_run = operation in ("profile", "generate") and out.exists()
    process = _start([*scene.command(operation, out), *(["--force"] if has_run else [])], place)
    _, said = process.communicate(timeout=TIMEOUT_S)
    if operation == "convert" and process.returncode == 2 and b"already" in said:
        process.returncode = 0  # it was complete
    if process.returncode != 0:
        return [f"run again it ends with {process.returncode}: {said.decode(errors='replace')[-600:]}"]
    return [f"run again, {what}" for what in _differences(result_of(operation, out), usual.result, "")]


def _differences(found: Any, usual: Any, place: str) -> Iterator[str]:
    """Of dictionaries what differs below; of lists what one has and the other has not."""
    if found == usual:
        return
    if isinstance(found, dict) and isinstance(usual, dict):
        for key in sorted(found.keys() | usual.keys()):
            yield from _differences(found.get(key), usual.get(key), f"{place} {key}")
    elif isinstance(found, list) and isinstance(usual, list) and set(map(str, found)) != set(map(str, usual)):
        more, fewer = ([x for x in a if x not in b] for a, b in ((found, usual), (usual, found)))
        yield f"{place} has also {str(more)[:600]} and lacks {str(fewer)[:600]}"
    else:
        yield f"{place} is {str(found)[:300]} and not {str(usual)[:300]}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[f"{row['operation']} {row['signal']}"] = kinds.get(f"{row['operation']} {row['signal']}", 0) + 1
    breaches = [
        f"{row['operation']} {row['signal']} after {row['after_s']} s: {what}" for row in rows for what in row["wrong"]
    ]
    ended = sum(row["code"] != 0 for row in rows)
    return {"kills": len(rows), "ended_early": ended, "kinds": dict(sorted(kinds.items())), "breaches": breaches}


def rows_made(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a run that ended early; a file of another seed or other code is not gone on with."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    source = ("circumstances", "source_sha256")
    if before["seed"] != header["seed"] or before[source[0]][source[1]] != header[source[0]][source[1]]:
        raise SystemExit(f"{path} is of another seed or of other code; move it away, or name another file")
    return list(before["rows"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--lanes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    end = time.monotonic() + arguments.minutes * 60
    home = Path(tempfile.mkdtemp(prefix="kills-"))
    header = {"schema": 2, "seed": arguments.seed, "lanes": arguments.lanes}
    header |= {"circumstances": circumstances("hundred_kills.py")}
    made = rows_made(arguments.out, header)
    result = ResultFile(arguments.out, header, summary, made)

    def one(number: int) -> None:
        if time.monotonic() > end:
            return
        operation, sent = OPERATIONS[number % 4], SIGNALS[number // 4 % 4]
        place = home / str(number)
        row = kill_once(scene, operation, sent, random.Random(arguments.seed * 100_000 + number), place)
        result.append({"number": number} | row)
        if not row["wrong"]:
            shutil.rmtree(place, ignore_errors=True)

    with signals_as_usual(), ThreadPoolExecutor(arguments.lanes) as pool:
        scene = Scene(home)
        list(pool.map(scene.undisturbed, OPERATIONS))
        list(pool.map(one, sorted(set(range(arguments.count)) - {row["number"] for row in made})))
    code = conclude(summary(result.rows))
    if code == 0:
        shutil.rmtree(home, ignore_errors=True)
    left = arguments.count - len(result.rows)
    if left > 0:
        print(f"{left} of {arguments.count} are left to make: the same command makes them")
    return code or (3 if left > 0 else 0)


if __name__ == "__main__":
    sys.exit(main())

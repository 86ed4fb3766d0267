"""Many inputs of every kind of tests/fuzz, in several processes: figures, and what failed.

    python benchmarks/long_fuzz.py --count 20000 --lanes 32 --seed 1 --out benchmarks/DATE_fuzz.json

Needs what wanvram needs and nothing else (hypothesis and pytest may be absent), no GPU and no network. A process that dies or stands still
is a failure, and its lane goes on with another seed. Exit code 1 on any failure.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from provenance import ROOT, circumstances

sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

STANDS_STILL_S = 300.0  # without a further input: a signal ends what takes 10 s, unless a library does not return
LARGEST_KEPT = 8192  # bytes of a file that is put into the result
# How often each kind comes in twenty inputs: the fast ones more often, so that all of them get a like share of time.
MIXTURE = "run,file,file,yaml,yaml,yaml,card,flags,flags,flags,flags,checkpoint,checkpoint,media,media,media,service,service,yaml,flags"


class Lane:
    def __init__(self, number: int, sources: Path, home: Path, arguments: argparse.Namespace) -> None:
        self.number, self.sources, self.home, self.arguments = number, sources, home, arguments
        self.left = arguments.count // arguments.lanes + (number < arguments.count % arguments.lanes)
        self.states: list[dict[str, Any]] = []

    def run(self) -> None:
        """As many processes as it takes: one, unless it dies."""
        for attempt in range(20):
            if self.left <= 0:
                return
            out = self.home / f"lane-{self.number}-{attempt}"
            out.mkdir()
            ended = self._one(out, self.arguments.seed * 1_000_000 + self.number * 1000 + attempt)
            state = _read(out / "state.json") or {"count": 0, "by_kind": {}, "seen": {}, "failures": []}
            if ended:
                last = (out / "last").read_text() if (out / "last").exists() else "the start"
                state["failures"].append(
                    {"kind": last.partition(",")[0], "kept": str(out / "now"), "wrong": f"{ended} at {last}"}
                )
                state["count"] += 1
            self.left -= max(state["count"], 1)
            self.states.append(state)
            if not ended and len(state["failures"]) >= 20:
                return  # the child ends itself

    def _one(self, out: Path, seed: int) -> str:
        """Why the process did not end well; empty if it did."""
        command = [sys.executable, str(ROOT / "tests/fuzz/child.py"), str(self.sources), str(out), str(seed)]
        command += ["--count", str(self.left), "--kinds", MIXTURE]
        env = os.environ | {
            "MALLOC_ARENA_MAX": "2",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        env["PYTHONPATH"] = str(ROOT / "src")
        with (out / "stdout").open("wb") as stdout, (out / "stderr").open("wb") as stderr:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env)
            last, since = "", time.monotonic()
            while child.poll() is None:
                time.sleep(0.5)
                now = (out / "last").read_text() if (out / "last").exists() else ""
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > STANDS_STILL_S:
                    child.kill()
                    child.wait()
                    return f"stood still for {STANDS_STILL_S:.0f} s"
        if child.returncode == 0:
            return ""
        return f"died ({child.returncode}): {(out / 'stderr').read_text(errors='replace')[-1500:]}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _kept(folder: Path) -> dict[str, str]:
    """Small files of a failed input, base64."""
    found = {}
    for path in sorted(folder.rglob("*"))[:200] if folder.is_dir() else []:
        if (
            path.is_file()
            and not path.is_symlink()
            and path.stat().st_size <= LARGEST_KEPT
            and path.stat().st_nlink == 1
        ):
            found[ascii(path.relative_to(folder).as_posix())[1:-1]] = base64.b64encode(path.read_bytes()).decode()
    return found


def summary(states: list[dict[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    failures: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for state in states:
        for kind, row in state["by_kind"].items():
            total = kinds.setdefault(kind, dict.fromkeys(row, 0))
            for name, value in row.items():
                total[name] = max(total[name], value) if name.startswith("worst") else round(total[name] + value, 3)
        for sign, count in state["seen"].items():
            seen[sign] = seen.get(sign, 0) + count
        for failure in state["failures"]:
            seen.setdefault(failure.get("sign", failure["wrong"]), 1)
            failures.setdefault(failure.get("sign", failure["wrong"]), failure)
    rows = [failure | {"files": _kept(Path(failure["kept"]))} for failure in failures.values()]
    inputs = sum(row["inputs"] for row in kinds.values())
    return {
        "inputs": inputs,
        "by_kind": dict(sorted(kinds.items())),
        "worst_cpu_seconds": max((row["worst_cpu_seconds"] for row in kinds.values()), default=0),
        "worst_bytes": max((row["worst_bytes"] for row in kinds.values()), default=0),
        "failed": sum(seen.values()),
        "failed_by_sign": seen,
        "failures": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--lanes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    start = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="wanvram-fuzz-"))
    from fuzz.sources import write_sources

    write_sources(home / "sources")
    lanes = [Lane(number, home / "sources", home, arguments) for number in range(arguments.lanes)]
    threads = [threading.Thread(target=lane.run) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result = summary([state for lane in lanes for state in lane.states])
    header = {
        "schema": 1,
        "seed": arguments.seed,
        "lanes": arguments.lanes,
        "seconds": round(time.monotonic() - start, 1),
    }
    document = header | {"circumstances": circumstances("long_fuzz.py")} | result
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(
        f"{result['inputs']} inputs in {header['seconds']} s, {result['failed']} failed, of {len(result['failures'])} kinds"
    )
    for failure in result["failures"]:
        print(f"FAILED {failure['kind']}: {failure['wrong'][:400]}")
    if result["inputs"] < arguments.count:
        print(f"FAILED only {result['inputs']} of {arguments.count} inputs were tried")
    if not result["failures"]:
        shutil.rmtree(home, ignore_errors=True)
    return 1 if result["failures"] or result["inputs"] < arguments.count else 0


if __name__ == "__main__":
    sys.exit(main())

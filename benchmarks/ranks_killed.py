"""Each process of a run on several GPUs ended at random moments: do all end within 15 seconds, with records that say which and why?

    python benchmarks/ranks_killed.py --gpus 2 --times 5              5 minutes on 2 H200s: KILL and STOP of each rank, INT of all
    python benchmarks/ranks_killed.py --gpus 2 --times 1 --tiny --out /tmp       anywhere: tries this script on the CPU

t2v-1.3B, 832*480, 81 frames with random weights through `wanvram generate --gpus N`. --times: for each rank, how often it is killed; once
each it is made to stand still; once the launcher is interrupted and once killed. What every GPU holds before and after is asked of
NVML. Writes <out>/<date>_<gpu>_ranks_killed.json; the exit code is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from provenance import ROOT, ResultFile, circumstances, conclude, environment_of_a_person

MOST_SECONDS = 15.0  # from the signal to the end of the last process
LEFT_BYTES = 16 * 2**20  # that a GPU may hold more than before
WANVRAM = [sys.executable, "-m", "wanvram", "generate", "--task", "t2v-1.3B", "--prompt", "a cat", "--base_seed", "1"]
TINY = ["--weights", "tiny", "--size", "128*80", "--frame_num", "9"]
FULL = [
    "--weights",
    "random",
    "--size",
    "832*480",
    "--frame_num",
    "33",
    "--precision",
    "bf16",
    "--load_strategy",
    "full",
]


def used(tiny: bool, gpus: int) -> list[int]:
    """Bytes of every GPU that the run uses."""
    if tiny:
        return [0] * gpus
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(gpus)]
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]


def cases(gpus: int, times: int) -> Iterator[tuple[str, signal.Signals]]:
    """(whom, signal)."""
    for rank in range(gpus):
        yield from ((f"rank {rank}", signal.SIGKILL) for _ in range(times))
        yield f"rank {rank}", signal.SIGSTOP
    yield from (("launcher", number) for number in (signal.SIGINT, signal.SIGKILL))


def ranks_of(launcher: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    found = {}
    for child in psutil.Process(launcher.pid).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (KeyError, psutil.Error):
            continue
    return found


def failures(run: Path, gpus: int) -> dict[str, Any]:
    """Of every record that was left, by rank."""
    found = {}
    for rank in range(gpus):
        path = run / ("record.json" if rank == 0 else f"record.rank{rank}.json")
        if path.exists():
            failure = json.loads(path.read_text(encoding="utf-8"))["failure"]
            found[str(rank)] = failure and {name: failure[name] for name in ("kind", "rank", "stage", "message")}
    return found


def end_one(whom: str, number: signal.Signals, after: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run whose process `whom` gets the signal so many seconds after all are there."""
    before = used(arguments.tiny, arguments.gpus)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [*WANVRAM, *(TINY if arguments.tiny else FULL), "--sample_steps", "50", "--gpus", str(arguments.gpus)]
        launcher = subprocess.Popen([*command, "-o", str(run)], cwd=folder, env=environment_of_a_person())
        while len(ranks := ranks_of(launcher)) < arguments.gpus and launcher.poll() is None:
            time.sleep(0.05)
        while not (run / "config.yaml").exists() and launcher.poll() is None:
            time.sleep(0.05)
        time.sleep(after)
        victim = launcher if whom == "launcher" else ranks[int(whom.split()[1])]
        start = time.monotonic()
        victim.send_signal(number)
        launcher.wait(120)
        _, alive = psutil.wait_procs(list(ranks.values()), timeout=60)
        seconds = time.monotonic() - start
        time.sleep(1.0)
        left = [now - then for now, then in zip(used(arguments.tiny, arguments.gpus), before, strict=True)]
        row = {"whom": whom, "signal": number.name, "after_seconds": after, "seconds": round(seconds, 2)}
        return row | {"hanging": len(alive), "left_bytes": left, "failures": failures(run, arguments.gpus)}


def breaches(row: dict[str, Any], gpus: int) -> list[str]:
    named = f"{row['whom']}, {row['signal']} after {row['after_seconds']:.1f} s"
    found = [f"{named}: {row['hanging']} processes hang"] if row["hanging"] else []
    if row["seconds"] > MOST_SECONDS:
        found.append(f"{named}: {row['seconds']} s until all had ended")
    if max(row["left_bytes"]) > LEFT_BYTES:
        found.append(f"{named}: a GPU holds {max(row['left_bytes'])} bytes more than before")
    rank = int(row["whom"].split()[1]) if row["whom"].startswith("rank") else None
    for other in range(gpus):
        if other == rank:
            continue
        failure = row["failures"].get(str(other))
        if failure is None or (rank is not None and failure["rank"] != rank):
            found.append(f"{named}: the record of rank {other} says {failure}")
    return found


def summary_of(rows: list[dict[str, Any]], gpus: int) -> dict[str, Any]:
    slowest = max((row["seconds"] for row in rows), default=0.0)
    broken = [breach for row in rows for breach in breaches(row, gpus)]
    return {"runs": len(rows), "slowest_seconds": slowest, "breaches": broken}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    name = "cpu" if arguments.tiny else "gpu"
    path = arguments.out / f"{datetime.date.today()}_{name}{arguments.gpus}_ranks_killed.json"
    header = circumstances("ranks_killed.py") | {"gpus": arguments.gpus, "seed": arguments.seed, "tiny": arguments.tiny}
    result = ResultFile(path, header, lambda rows: summary_of(rows, arguments.gpus))
    draw = random.Random(arguments.seed)
    for whom, number in cases(arguments.gpus, arguments.times):
        row = end_one(whom, number, draw.uniform(0.0, 2.0 if arguments.tiny else 10.0), arguments)
        print(json.dumps(row), flush=True)
        result.append(row)
    return conclude(summary_of(result.rows, arguments.gpus))


if __name__ == "__main__":
    sys.exit(main())

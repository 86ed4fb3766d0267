"""Is what advice promises true? The predicted saving of every change it names against the saving measured on a GPU.

    python benchmarks/advice_saving.py plan advice_cases.json                   anywhere: asks for advice, 5 minutes of CPU
    python benchmarks/advice_saving.py run advice_cases.json --out benchmarks   on the GPU

Five configurations with random full-size weights and 2 steps. Each runs as it is and with each of the up to three changes, every run in
a fresh process (`wanvram profile --device cuda`), so that none sees another's allocator. Savings are of the run's peaks; device
memory is the driver's view. Exit code 1 where a saving of device or reserved memory is over 3 % off what was measured (64 MiB where
nothing was to be saved), where the time that a change adds or saves is off by over a second and a fifth of it, or where a run fails,
which is a row. Writes <out>/<date>_<gpu>_advice_saving.json after every change.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import conclude, header, unused

from wanvram.advice import Advice
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.predict.advice import advise
from wanvram.predict.simulate import simulate

GIB = 2**30
BOUND = 0.03
SMALL_BYTES = 64 * 2**20
MOST_SECONDS, MOST_SHARE_OF_SECONDS = 1.0, 0.2
FIGURES = ("device", "reserved", "allocated")


def case(task: str, size: str, frames: int, **knobs: Any) -> RunConfig:
    request = Request.for_task(task, size=size, frame_num=frames, sample_steps=2, base_seed=1)
    name = "-".join([task, size.replace("*", "x"), str(frames), *(f"{k}={v}" for k, v in knobs.items())])
    strategy = Strategy(**{"offload": True} | knobs)
    return RunConfig(name, "advice_saving", "simulated", request, strategy, Measurement(log_interval=10), gpu="h200")


CASES = [
    case("t2v-1.3B", "832*480", 81),
    case("t2v-1.3B", "832*480", 81, load_strategy="block"),
    case("t2v-1.3B", "832*480", 33, load_strategy="block", resident_blocks=30, vae_tile=30),
    case("t2v-14B", "832*480", 33, offload=False),
    case("t2v-14B", "1280*720", 17),
]


def plan_cases(target: Path) -> None:
    """Asks for advice on each case; every change it names is a row, with what whole simulated runs say it saves."""
    cases = []
    for config in CASES:
        start = time.monotonic()
        record, _ = simulate(config)
        advices = advise(config, record)
        seconds = time.monotonic() - start
        for advice in advices:
            changed = replace(config, strategy=replace(config.strategy, **advice.knobs))
            peaks = [r.to_json()["peak"] for r in (record, simulate(changed)[0])]
            predicted = savings(*peaks)
            check_same(config.name, advice, predicted)
            cases.append({
                "name": config.name,
                "change": advice.change,
                "before": config.to_dict(),
                "after": changed.to_dict(),
                "predicted": predicted,
                "predicted_peaks": peaks,
                "predicted_seconds": advice.seconds,
                "advice_seconds": seconds,
            })  # fmt: skip
            print(f"{config.name}: {advice.change} saves {saved_text(predicted)}", flush=True)
        target.write_text(json.dumps(cases, indent=1) + "\n")


def savings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """From the peaks of two runs."""
    return {figure: before[f"{figure}_bytes"] - after[f"{figure}_bytes"] for figure in FIGURES}


def saved_text(saved: dict[str, int]) -> str:
    return ", ".join(f"{figure} {nbytes / GIB:.3f} GiB" for figure, nbytes in saved.items())


def check_same(name: str, advice: Advice, predicted: dict[str, int]) -> None:
    """Advice comes from runs recorded without blocks; what it promises must be what the runs to be measured are predicted."""
    promised = {"device": advice.saved_bytes, "allocated": advice.saved_allocated_bytes}
    if promised != {figure: predicted[figure] for figure in promised}:
        raise RuntimeError(f"{name}: advice promises {promised}, whole simulated runs differ by {predicted}")


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """The record of the configuration on the GPU, in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "wanvram", "profile", str(path), "--device", "cuda", "--json"]
        result = subprocess.run(
            [*command, "-o", str(Path(scratch) / "run")], capture_output=True, text=True, check=False
        )
    if not result.stdout.strip():
        raise RuntimeError(f"{config['name']}: measuring failed: {result.stderr[-1500:]}")
    record = dict(json.loads(result.stdout))
    if record["failure"]:
        raise RuntimeError(f"{config['name']}: {record['failure']['message']}")
    return record


def compared(case: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The case with measured savings beside the predicted ones."""
    result = case | {"device": before["device"], "peaks": [before["peak"], after["peak"]]}
    for figure, saved in savings(before["peak"], after["peak"]).items():
        predicted = case["predicted"][figure]
        error = predicted / saved - 1 if saved else None
        result[f"{figure}_saving"] = {"predicted": predicted, "measured": saved, "error": error}
    times = [sum(s["seconds"] or 0.0 for s in r["stages"] if s["kind"] == "stage") for r in (before, after)]
    return result | {"measured_seconds": times[1] - times[0]}


def show(row: dict[str, Any]) -> None:
    cells = []
    for figure in FIGURES:
        saving = row[f"{figure}_saving"]
        error = "" if saving["error"] is None else f" {saving['error']:+.2%}"
        cells.append(f"{figure} {saving['predicted'] / GIB:.3f} / {saving['measured'] / GIB:.3f} GiB{error}")
    cells.append(f"time {row['predicted_seconds']} / {row['measured_seconds']:.2f} s")
    print(f"{row['name']}: {row['change']}: {', '.join(cells)}", flush=True)


def breaches_of(row: dict[str, Any]) -> list[str]:
    """A sentence for each bound that a change misses."""
    name = f"{row['name']} {row['change']}"
    if "error" in row:
        return [f"{name}: {row['error'].strip().splitlines()[-1]}"]
    found = []
    for figure in ("device", "reserved"):
        predicted, saved = (row[f"{figure}_saving"][key] for key in ("predicted", "measured"))
        if abs(predicted - saved) > max(BOUND * abs(saved), 0 if saved else SMALL_BYTES):
            found.append(f"{name}: {figure} {predicted:,} predicted, {saved:,} saved")
    predicted, seconds = row["predicted_seconds"] or 0.0, row["measured_seconds"]
    if abs(predicted - seconds) > MOST_SECONDS + MOST_SHARE_OF_SECONDS * abs(seconds):
        found.append(f"{name}: {predicted:+.2f} s predicted, {seconds:+.2f} s measured")
    return found


def row_of(planned: dict[str, Any], before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """before: what was measured of each configuration as it is."""
    try:
        if planned["name"] not in before:
            before[planned["name"]] = measure(planned["before"])
        return compared(planned, before[planned["name"]], measure(planned["after"]))
    except RuntimeError as error:
        return planned | {"error": str(error)}


def run_cases(cases: list[dict[str, Any]], target: Path, seconds: float) -> int:
    """One run after the other."""
    start, about = time.monotonic(), header("advice_saving.py")
    rows: list[dict[str, Any]] = []
    breaches: list[str] = []
    before: dict[str, dict[str, Any]] = {}
    for planned in cases:
        if time.monotonic() - start > seconds:
            print(f"stopped for time before {planned['name']}: {planned['change']}")
            break
        rows.append(row_of(planned, before))
        breaches += breaches_of(rows[-1])
        if "error" not in rows[-1]:
            show(rows[-1])
        target.write_text(json.dumps(about | {"breaches": breaches, "rows": rows}, indent=1) + "\n")
    return conclude({"changes": len(rows), "breaches": breaches})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("cases", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--gpu", default="h200", help="only names the file")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    args = parser.parse_args()
    if args.what == "plan":
        plan_cases(args.cases)
        return 0
    cases = json.loads(args.cases.read_text())
    target = unused(args.out / f"{datetime.date.today()}_{args.gpu}_advice_saving.json")
    return run_cases(cases, target, args.seconds)


if __name__ == "__main__":
    sys.exit(main())

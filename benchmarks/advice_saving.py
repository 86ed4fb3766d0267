"""Is what advice promises true? The predicted saving of the best lossless change against the saving measured on a GPU.

    python benchmarks/advice_saving.py plan advice_cases.json                  anywhere: asks for advice, 2 minutes of CPU
    python benchmarks/advice_saving.py run advice_cases.json --out benchmarks  on the GPU

Five configurations with random full-size weights and 2 steps. Each runs as it is and with the change, every run in a fresh process
(`wanvram profile --device cuda`), so that neither sees the other's allocator. Savings are of the run's peaks; device memory is the
driver's view. The project's bound is 3 % of the measured saving. Writes <out>/<date>_<gpu>_advice_saving.json after every case.
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

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.run.advice import advise
from wanvram.run.execute import simulate

GIB = 2**30
BOUND = 0.03


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
    """Asks for advice on each case and keeps the best lossless one."""
    cases = []
    for config in CASES:
        start = time.monotonic()
        record, _ = simulate(config)
        best = next(advice for advice in advise(config, record) if advice.lossless)
        changed = replace(config, strategy=replace(config.strategy, **best.knobs))
        cases.append({
            "name": config.name,
            "change": best.change,
            "before": config.to_dict(),
            "after": changed.to_dict(),
            "predicted": {"device": best.saved_device_bytes, "allocated": best.saved_allocated_bytes},
            "predicted_seconds": best.seconds,
            "advice_seconds": time.monotonic() - start,
        })  # fmt: skip
        print(f"{config.name}: {best.change} saves {best.saved_device_bytes / GIB:.2f} GiB", flush=True)
        target.write_text(json.dumps(cases, indent=1) + "\n")


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


def compared(case: dict[str, Any]) -> dict[str, Any]:
    before, after = measure(case["before"]), measure(case["after"])
    result = case | {"device": before["device"], "peaks": [before["peak"], after["peak"]]}
    for figure in ("device", "allocated"):
        saved = before["peak"][f"{figure}_bytes"] - after["peak"][f"{figure}_bytes"]
        error = case["predicted"][figure] / saved - 1 if saved else None
        result[figure + "_saving"] = {"predicted": case["predicted"][figure], "measured": saved, "error": error}
    times = [sum(s["seconds"] or 0.0 for s in r["stages"] if s["kind"] == "stage") for r in (before, after)]
    return result | {"measured_seconds": times[1] - times[0]}


def run_cases(cases: list[dict[str, Any]], out: Path, gpu: str, seconds: float) -> None:
    start, rows = time.monotonic(), []
    target = out / f"{datetime.date.today()}_{gpu}_advice_saving.json"
    for planned in cases:
        if time.monotonic() - start > seconds:
            print(f"stopped for time before {planned['name']}")
            break
        row = compared(planned)
        rows.append(row)
        cells = [
            f"{figure} {s['predicted'] / GIB:.3f} / {s['measured'] / GIB:.3f} GiB {s['error']:+.2%}"
            for figure in ("device", "allocated")
            if (s := row[f"{figure}_saving"])["error"] is not None
        ]
        times = f"{row['predicted_seconds']} / {row['measured_seconds']:.2f} s"
        print(f"{row['name']}: {row['change']}: {', '.join(cells)}, time {times}", flush=True)
        target.write_text(json.dumps(rows, indent=1) + "\n")
    errors = [abs(row["device_saving"]["error"]) for row in rows if row["device_saving"]["error"] is not None]
    if errors:
        print(f"{len(errors)} cases, worst error of the device saving {max(errors):.2%} (bound {BOUND:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("cases", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--gpu", default="h200", help="only names the file")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    args = parser.parse_args()
    if args.what == "plan":
        plan_cases(args.cases)
    else:
        run_cases(json.loads(args.cases.read_text()), args.out, args.gpu, args.seconds)


if __name__ == "__main__":
    main()

"""Predicted against measured memory, stage by stage: does the simulator tell the truth?

    python benchmarks/predict_vs_measure.py                       the built-in list
    python benchmarks/predict_vs_measure.py --short               steps of well under a second, for calibrate_clock.py
    python benchmarks/predict_vs_measure.py a.yaml b.yaml         your configurations
    python benchmarks/predict_vs_measure.py --only 1.3B --out DIR
    python benchmarks/predict_vs_measure.py --again benchmarks/2026-11-24_h200_predict_vs_measure.json     no GPU: is it still true?
                                                                  (its file is left as it is; --out DIR writes what is predicted now)

Every configuration runs in a fresh process on the GPU (random weights, few steps) and is predicted in another on the CPU; the table gives
allocated, reserved and device peak of each stage with the signed error of the prediction. Writes DIR/<date>_<gpu>_predict_vs_measure.json.
Exit code 1 beyond the bounds of the project, allocated 0.5 %, reserved 1 %, device 3 %, and where
 a run fails or has other stages than predicted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from provenance import circumstances, conclude, steady_step, unused

BOUNDS = {"allocated": 0.005, "reserved": 0.01, "device": 0.03}


def case(
    task: str, size: str, frames: int, precision: str, load: str = "full", steps: int = 3, **more: Any
) -> dict[str, Any]:
    """One configuration as the YAML's dictionary."""
    optimization = {
        k: more[k] for k in ("expandable_segments", "cfg", "attention_slicing", "rows_per_chunk") if k in more
    }
    model = {
        "precision": precision,
        "load_strategy": load,
        "offload": more.get("offload", False),
        "t5_cpu": more.get("t5_cpu", False),
    }
    tags = [task, size.replace("*", "x"), f"{frames}f", precision, load]
    tags += [k for k in ("offload", "t5_cpu", "expandable_segments", "attention_slicing") if more.get(k)]
    tags += [more["cfg"]] if "cfg" in more else []
    return {
        "name": "-".join(tags),
        "description": "predict_vs_measure",
        "model_config": model,
        "optimization": optimization,
        "logging": {"log_interval": 1},
        "request": {
            "task": task,
            "size": size,
            "frame_num": frames,
            "sample_steps": steps,
            "base_seed": 1,
            "weights": "random",
        },
    }


BUILT_IN = [
    case("t2v-1.3B", "832*480", 81, "bf16"),
    case("t2v-1.3B", "832*480", 81, "fp16", "block"),
    case("t2v-1.3B", "832*480", 81, "bf16", offload=True),
    case("t2v-1.3B", "832*480", 81, "bf16", "block", offload=True, expandable_segments=True),
    case("t2v-1.3B", "832*480", 33, "fp32", offload=True),
    case("t2v-1.3B", "832*480", 33, "bf16", "block", offload=True, attention_slicing=True),
    case("t2v-1.3B", "480*832", 17, "bf16", t5_cpu=True, offload=True),
    case("t2v-1.3B", "832*480", 17, "fp16", steps=8, expandable_segments=True),
    case("t2v-1.3B", "832*480", 81, "bf16", offload=True, cfg="joint"),
    case("t2v-14B", "832*480", 33, "bf16", "block", offload=True),
    case("t2v-14B", "832*480", 81, "fp16", offload=True),
    case("t2v-14B", "1280*720", 17, "bf16", expandable_segments=True, offload=True),
    case("t2v-14B", "1280*720", 81, "bf16", steps=2, offload=True),
]


# Steps that the host, the link or a small chunk may set the pace of: 8, the first in blocks, the others folded.
SHORT = [
    case(task, size, frames, "bf16", load, steps=8, offload=True, expandable_segments=True)
    | {"logging": {"log_interval": 8}}
    for task, size, frames, load in (
        ("t2v-1.3B", "832*480", 5, "full"),
        ("t2v-1.3B", "832*480", 5, "block"),
        ("t2v-1.3B", "832*480", 17, "full"),
        ("t2v-1.3B", "832*480", 17, "block"),
        ("vace-1.3B", "480*832", 17, "full"),
        ("t2v-14B", "832*480", 5, "full"),
        ("t2v-14B", "832*480", 5, "block"),
        ("t2v-14B", "832*480", 17, "full"),
        ("t2i-14B", "832*480", 1, "full"),
    )
]


def profile(config: Path, directory: Path, *device: str) -> dict[str, Any]:
    """The record of a run in a fresh process."""
    command = [sys.executable, "-m", "wanvram", "profile", str(config), "-o", str(directory), "--json", "--device"]
    result = subprocess.run([*command, *device], capture_output=True, text=True, check=False)
    if not result.stdout.strip():
        raise RuntimeError(f"{config.stem}: the run on {device[0]} failed: {result.stderr[-1500:]}")
    return dict(json.loads(result.stdout))


def predict_and_measure(config: Path, scratch: Path, gpu: str) -> dict[str, Any]:
    """Runs and predicts one configuration; the prediction, which needs one core and no GPU, is made beside the run."""
    with ThreadPoolExecutor(1) as beside:
        prediction = beside.submit(profile, config, scratch / "predicted" / config.stem, "simulated", "--gpu", gpu)
        measured = result_of(profile(config, scratch / "measured" / config.stem, "cuda"))
        return compared(measured, prediction.result())


def predict_again(result: dict[str, Any], scratch: Path, gpu: str) -> dict[str, Any]:
    """An earlier result with what is predicted now."""
    config = scratch / f"{result['config']}.yaml"
    config.write_text(json.dumps(result["configuration"]))
    return compared(result, profile(config, scratch / "predicted" / config.stem, "simulated", "--gpu", gpu))


def result_of(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a measured run's record."""
    return {
        "config": record["config"]["name"],
        "configuration": record["config"],
        "rows": [
            {"stage": stage["name"]} | {q: {"measured": stage[f"peak_{q}_bytes"]} for q in BOUNDS}
            for stage in record["stages"]
        ],
        "seconds": {stage["name"]: stage["seconds"] for stage in record["stages"]},
        "step_seconds": steady_step(record),
        "environment": record.get("environment"),
        "attention": (record.get("attention") or {}).get("taken"),
        "failure": record.get("failure"),
    }


def compared(result: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """The result with, for each quantity of each stage, predicted, measured and signed relative error."""
    coming: dict[str, list[dict[str, Any]]] = {}  # the VAE is loaded twice where pictures are encoded
    for stage in predicted["stages"]:
        coming.setdefault(stage["name"], []).append(stage)
    rows = []
    for earlier in result["rows"]:
        row: dict[str, Any] = {"stage": earlier["stage"]}
        if not coming.get(earlier["stage"]):
            raise RuntimeError(f"{result['config']}: the stage {earlier['stage']} was measured and is not predicted")
        stage = coming[earlier["stage"]].pop(0)
        for quantity in BOUNDS:
            p, m = stage[f"peak_{quantity}_bytes"], earlier[quantity]["measured"]
            row[quantity] = {"predicted": p, "measured": m, "error": (p - m) / m if m else 0.0}
        rows.append(row)
    unmeasured = [name for name, stages in coming.items() if stages and name not in ("start", "save")]
    return result | {"rows": rows, "unmeasured": unmeasured}


def breaches_of(result: dict[str, Any]) -> list[str]:
    """A sentence for each bound that one configuration misses."""
    name = result["config"]
    if result.get("error"):
        return [f"{name}: {result['error'].strip().splitlines()[-1]}"]
    found = [f"{name}: {result['failure']['message']}"] if result.get("failure") else []
    found += [f"{name}: {stage} is predicted and was not measured" for stage in result.get("unmeasured", ())]
    for row in result["rows"]:
        for quantity, bound in BOUNDS.items():
            if abs(row[quantity]["error"]) > bound:
                found.append(f"{name}: {row['stage']} {quantity} {row[quantity]['error']:+.3%}, at most {bound:.1%}")
    return found


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}")
    for row in rows:
        cells = []
        for quantity, bound in BOUNDS.items():
            c = row[quantity]
            flag = "" if abs(c["error"]) <= bound else " MISS"
            cells.append(
                f"{quantity} {c['predicted'] / 2**20:9.1f} / {c['measured'] / 2**20:9.1f} MiB {c['error']:+.3%}{flag}"
            )
        print(f"  {row['stage']:18s} " + "   ".join(cells), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--only", default="", help="only built-in cases whose name contains this")
    parser.add_argument("--short", action="store_true", help="the list of short steps in place of the built-in one")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument(
        "--out", type=Path, help="folder for the result (default: benchmarks; with --again of a file: none)"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    parser.add_argument(
        "--again",
        type=Path,
        metavar="PATH",
        help="predict anew, without a GPU, what a result file (not changed) or the run directories in a folder measured",
    )
    return parser.parse_args()


def work(args: argparse.Namespace, scratch: Path) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and what makes its result, for every case."""
    if args.again:
        records = sorted(args.again.glob("*/record.json"))
        measured = [result_of(json.loads(path.read_text())) for path in records]
        earlier = measured or json.loads(args.again.read_text())
        return [(result["config"], partial(predict_again, result, scratch, args.gpu)) for result in earlier]
    configs = list(args.configs)
    if not configs:
        for built_in in SHORT if args.short else BUILT_IN:
            if args.only in built_in["name"]:
                path = scratch / f"{built_in['name']}.yaml"
                path.write_text(json.dumps(built_in))
                configs.append(path)
    return [(path.stem, partial(predict_and_measure, path, scratch, args.gpu)) for path in configs]


def main() -> int:
    args, start = parse(), time.monotonic()
    kind = args.again.name if args.again and args.again.is_dir() else "predict_vs_measure"
    if args.again and args.again.is_file():
        kind = f"{args.again.stem.split('_', 2)[-1]}_again"
    target = None
    if args.out or not (args.again and args.again.is_file()):
        target = unused((args.out or Path("benchmarks")) / f"{datetime.date.today()}_{args.gpu}_{kind}.json")
    about = circumstances("predict_vs_measure.py")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in work(args, Path(scratch)):
            if time.monotonic() - start > args.seconds:
                print(f"\nstopped for time before {name}")
                break
            try:
                results.append(make() | {"predicted_by": about})
            except RuntimeError as error:
                print(f"\n{error}", flush=True)
                results.append({"config": name, "rows": [], "error": str(error)})
                continue
            show(name, results[-1]["rows"])
            if target:
                target.write_text(json.dumps(results, indent=1) + "\n")
    rows = [row for result in results for row in result["rows"]]
    equal = sum(row[q]["predicted"] == row[q]["measured"] for row in rows for q in ("allocated", "reserved"))
    print(f"\n{equal} of {2 * len(rows)} stage peaks of allocated and reserved memory equal to the byte")
    worst = {q: max((abs(row[q]["error"]) for row in rows), default=0.0) for q in BOUNDS}
    print("worst errors: " + ", ".join(f"{q} {e:.3%} (bound {BOUNDS[q]:.1%})" for q, e in worst.items()))
    return conclude(
        {"runs": len(results), "breaches": [breach for result in results for breach in breaches_of(result)]}
    )


if __name__ == "__main__":
    sys.exit(main())

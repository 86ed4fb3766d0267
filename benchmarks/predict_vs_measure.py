"""Predicted against measured memory, stage by stage: does the simulator tell the truth?

    python benchmarks/predict_vs_measure.py                       the built-in list
    python benchmarks/predict_vs_measure.py a.yaml b.yaml         your configurations
    python benchmarks/predict_vs_measure.py --only 1.3B --out DIR
    python benchmarks/predict_vs_measure.py --again benchmarks/2026-11-24_h200_predict_vs_measure.json     no GPU: is it still true?

Every configuration runs in a fresh process on the GPU (random weights, few steps) and is predicted in another on the CPU; the table gives
allocated, reserved and device peak of each stage with the signed error of the prediction. Writes DIR/<date>_<gpu>_predict_vs_measure.json.
Bounds of the project: allocated 0.5 %, reserved 1 %, device 3 %.
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
        "environment": record.get("environment"),
    }


def compared(result: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """The result with, for each quantity of each stage, predicted, measured and signed relative error."""
    coming: dict[str, list[dict[str, Any]]] = {}  # the VAE is loaded twice where pictures are encoded
    for stage in predicted["stages"]:
        coming.setdefault(stage["name"], []).append(stage)
    rows = []
    for earlier in result["rows"]:
        row: dict[str, Any] = {"stage": earlier["stage"]}
        stage = coming[earlier["stage"]].pop(0)
        for quantity in BOUNDS:
            p, m = stage[f"peak_{quantity}_bytes"], earlier[quantity]["measured"]
            row[quantity] = {"predicted": p, "measured": m, "error": (p - m) / m if m else 0.0}
        rows.append(row)
    return result | {"rows": rows}


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
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    parser.add_argument(
        "--again",
        type=Path,
        metavar="PATH",
        help="predict anew, without a GPU, what a result file (rewritten) or the run directories in a folder measured",
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
        for built_in in BUILT_IN:
            if args.only in built_in["name"]:
                path = scratch / f"{built_in['name']}.yaml"
                path.write_text(json.dumps(built_in))
                configs.append(path)
    return [(path.stem, partial(predict_and_measure, path, scratch, args.gpu)) for path in configs]


def main() -> None:
    args, start = parse(), time.monotonic()
    kind = args.again.name if args.again and args.again.is_dir() else "predict_vs_measure"
    target = args.out / f"{datetime.date.today()}_{args.gpu}_{kind}.json"
    target = args.again if args.again and args.again.is_file() else target
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in work(args, Path(scratch)):
            if time.monotonic() - start > args.seconds:
                print(f"\nstopped for time before {name}")
                break
            try:
                results.append(make())
            except RuntimeError as error:
                if args.again:
                    sys.exit(str(error))  # nothing is written: what was measured must not be lost
                print(f"\n{error}", flush=True)
                results.append({"config": name, "rows": [], "error": str(error)})
                continue
            show(name, results[-1]["rows"])
            if not args.again:
                target.write_text(json.dumps(results, indent=1) + "\n")
    if args.again:
        target.write_text(json.dumps(results, indent=1) + "\n")
    rows = [row for result in results for row in result["rows"]]
    equal = sum(row[q]["predicted"] == row[q]["measured"] for row in rows for q in ("allocated", "reserved"))
    print(f"\n{equal} of {2 * len(rows)} stage peaks of allocated and reserved memory equal to the byte")
    worst = {q: max((abs(row[q]["error"]) for row in rows), default=0.0) for q in BOUNDS}
    print("worst errors: " + ", ".join(f"{q} {e:.3%} (bound {BOUNDS[q]:.1%})" for q, e in worst.items()))


if __name__ == "__main__":
    main()

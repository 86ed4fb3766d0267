"""Predicted against measured memory, stage by stage: does the simulator tell the truth?

    python benchmarks/predict_vs_measure.py                       the built-in list
    python benchmarks/predict_vs_measure.py a.yaml b.yaml         your configurations
    python benchmarks/predict_vs_measure.py --only 1.3B --out DIR

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
from concurrent.futures import ThreadPoolExecutor
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


def predicted_and_measured(config: Path, scratch: Path, gpu: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The prediction, which needs one core and no GPU, is made beside the measurement."""
    with ThreadPoolExecutor(1) as beside:
        prediction = beside.submit(profile, config, scratch / "predicted" / config.stem, "simulated", "--gpu", gpu)
        measured = profile(config, scratch / "measured" / config.stem, "cuda")
        return prediction.result(), measured


def compare(predicted: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per stage: for each quantity predicted, measured and signed relative error."""
    rows = []
    by_name = {stage["name"]: stage for stage in predicted["stages"]}
    for stage in measured["stages"]:
        other = by_name[stage["name"]]
        row: dict[str, Any] = {"stage": stage["name"]}
        for quantity in BOUNDS:
            key = f"peak_{quantity}_bytes"
            p, m = other[key], stage[key]
            row[quantity] = {"predicted": p, "measured": m, "error": (p - m) / m if m else 0.0}
        rows.append(row)
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--only", default="", help="only built-in cases whose name contains this")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    args = parser.parse_args()
    start = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        configs = list(args.configs)
        if not configs:
            for built_in in BUILT_IN:
                if args.only in built_in["name"]:
                    path = Path(scratch) / f"{built_in['name']}.yaml"
                    path.write_text(json.dumps(built_in))
                    configs.append(path)
        for path in configs:
            if time.monotonic() - start > args.seconds:
                print(f"\nstopped for time before {path.stem}")
                break
            try:
                predicted, measured = predicted_and_measured(path, Path(scratch), args.gpu)
            except RuntimeError as error:
                print(f"\n{error}", flush=True)
                results.append({"config": path.stem, "rows": [], "error": str(error)})
                continue
            rows = compare(predicted, measured)
            show(path.stem, rows)
            steps = {s["name"]: s["seconds"] for s in measured["stages"]}
            results.append(
                {"config": path.stem, "rows": rows, "seconds": steps, "environment": measured.get("environment")}
            )
            date = datetime.date.today().isoformat()
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{date}_{args.gpu}_predict_vs_measure.json").write_text(json.dumps(results, indent=1))
    worst = {q: max((abs(r[q]["error"]) for x in results for r in x["rows"]), default=0.0) for q in BOUNDS}
    print("\nworst errors: " + ", ".join(f"{q} {e:.3%} (bound {BOUNDS[q]:.1%})" for q, e in worst.items()))


if __name__ == "__main__":
    main()

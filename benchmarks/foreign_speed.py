"""How long other people's code takes in the simulation, on one core: a tiled 480P decode of Wan's VAE, and Flux's transformer.

    python benchmarks/foreign_speed.py                  writes <out>/<date>_foreign_speed.json; exit code 1 over a bound
    python benchmarks/foreign_speed.py --only decode

An operation is one that makes or changes a tensor; views are not counted, their time is. Seconds are of the processor, the best of
nine simulations, the first of which imports: other programs on the processor only ever add. Needs diffusers; no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foreign_cases import flux, vae

RUNS = 9
# case -> what is called, most seconds, most microseconds per operation
CASES: dict[str, tuple[Callable[[], Callable[[], Any]], float, float]] = {
    "decode-480p-81-tiled": (
        lambda: vae("AutoencoderKLWan", (1, 16, 21, 60, 104), "fp32", tiled=True),
        15.0,
        60.0,
    ),
    "flux-1024": (lambda: flux(1024), 1.0, 60.0),
}


def measured(make: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """Best of RUNS, each in a simulation of its own."""
    import torch

    from wanvram import simulated_gpu

    best: dict[str, Any] = {}
    for _ in range(RUNS):
        with simulated_gpu("h200") as gpu, torch.no_grad():
            call = make()
            before, start = gpu.memory.operations, time.process_time()
            call()
            seconds, operations = time.process_time() - start, gpu.memory.operations - before
        if not best or seconds < best["seconds"]:
            best = {"seconds": round(seconds, 3), "operations": operations}
            best["us_per_operation"] = round(seconds / operations * 1e6, 1)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    for name, (make, most_seconds, most_us) in CASES.items():
        if args.only not in name:
            continue
        row = measured(make) | {"most_seconds": most_seconds, "most_us_per_operation": most_us}
        row["ok"] = row["seconds"] <= most_seconds and row["us_per_operation"] <= most_us
        rows[name] = row
        verdict = "ok" if row["ok"] else "OVER ITS BOUND"
        print(
            f"{name:24s} {row['seconds']:7.2f} s {row['us_per_operation']:7.1f} us per operation  {verdict}", flush=True
        )
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"{datetime.date.today()}_foreign_speed.json"
    target.write_text(json.dumps({"date": str(datetime.date.today()), "cases": rows}, indent=1) + "\n")
    print(f"Wrote {target}")
    sys.exit(not rows or not all(row["ok"] for row in rows.values()))


if __name__ == "__main__":
    main()

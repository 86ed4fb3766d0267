"""Other people's models on the simulated card, predicted first, then measured: every row with its error.

    python benchmarks/foreign_predict.py predict                 no GPU: writes <out>/<date>_h200_foreign_predicted.json
    python benchmarks/foreign_predict.py measure                 on the GPU: writes <out>/<date>_<gpu>_foreign_measured.json
    python benchmarks/foreign_predict.py judge PREDICTED MEASURED
    python benchmarks/foreign_predict.py predict --only flux,vae      some cases
    python benchmarks/foreign_predict.py measure --only dit/ltx,dit/sd3,dit/flux,dit/wan-1.3b      device memory of transformers

Needs diffusers, accelerate, transformers and torchvision. Models are built from their configurations with random weights, nothing
is loaded. Each case is a process of its own, the same code on both cards: build, empty the cache, then the call twice. Figures
are PyTorch's own counters: base is allocated before the first call; allocated and reserved are the peaks of both calls; device is
what NVML says that the whole process takes of the GPU at its highest, polled from outside (none where pynvml is not there). The
predictions are committed before anything is measured; a row that is measured again replaces the one before.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foreign_cases import CASES
from nvml_watch import watch

MIB = 2**20
MOST_SECONDS = 900.0  # of a case
MOST_OF_DEVICE = 3.0  # percent of NVML's figure, where PyTorch's own are as stated
FIGURES = ("base_bytes", "allocated_bytes", "reserved_bytes")


def run_case(name: str) -> dict[str, Any]:
    """The figures of one case on whatever card `cuda` is."""
    import torch

    with torch.no_grad():
        call = CASES[name]()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        start = time.perf_counter()
        for _ in range(2):
            call()
        torch.cuda.synchronize()
    return {
        "base_bytes": base,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "seconds": time.perf_counter() - start,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
    }


def here(name: str, card: str | None) -> int:
    """One case in this process; its figures are the last line of stdout."""
    if card is None:
        row = run_case(name)
    else:
        from wanvram import simulated_gpu

        with simulated_gpu(card) as gpu:
            row = run_case(name)
        row |= {"gaps": list(gpu.gaps), "operations": gpu.memory.operations}
        buffers = gpu.memory.buffers
        row |= {"below_bytes": max(buffers.ranged.values(), default=0), "above_bytes": buffers.above_bytes}
        row |= {"basis": gpu.peak.basis, "device_bytes": gpu.peak.device_bytes}
    print(json.dumps(row))
    return 0


def in_process(name: str, card: str | None) -> dict[str, Any]:
    """The row of a case from a fresh process, or {"error": the end of what it said}."""
    command = [sys.executable, "-W", "ignore", __file__, "here", name, *([card] if card else [])]
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "", "TOKENIZERS_PARALLELISM": "false"}
    if card is None and find_spec("pynvml") is not None:
        done = watch(command, env=environment, timeout=MOST_SECONDS)
        code, out, said = done["exit_code"], done["stdout_tail"], done["stderr_tail"]
        more = {"device_bytes": done["above_bytes"], "device_before_bytes": done["before_bytes"]}
    else:
        try:
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            return {"error": f"longer than {MOST_SECONDS:g} s"}
        code, out, said, more = ended.returncode, ended.stdout, ended.stderr, {}
    if code:
        return {"error": said.strip()[-800:] or f"exit status {code}"}
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found | more


def collect(args: argparse.Namespace, card: str | None) -> int:
    """Rows of all chosen cases into one file, written after each."""
    target, start = args.target, time.monotonic()
    rows: dict[str, Any] = json.loads(target.read_text())["cases"] if target.exists() else {}
    for name in chosen(args.only):
        if time.monotonic() - start > args.seconds:
            print(f"{name:34s} not started: {args.seconds:g} s are over", flush=True)
            continue
        rows[name] = in_process(name, card)
        document = {"date": str(datetime.date.today()), "simulated": card is not None, "cases": rows}
        target.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{name:34s} {shown(rows[name])}", flush=True)
    print(f"Wrote {target}")
    return 1 if any("error" in row for row in rows.values()) else 0


def chosen(only: str) -> list[str]:
    found = [name for name in CASES if any(word in name for word in only.split(","))]
    if not found:
        sys.exit(f"--only {only} leaves nothing of {', '.join(CASES)}")
    return found


def shown(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"FAILED: {row['error'].splitlines()[-1][:150]}"
    return " ".join(f"{row[key] / MIB:12.2f}" for key in FIGURES) + f" {row['seconds']:8.1f} s"


def judge(predicted_file: Path, measured_file: Path) -> int:
    """Every measured case beside its prediction, errors in percent of the measured; misses are named, and exit with 1."""
    missed = 0
    predicted, measured = (json.loads(path.read_text())["cases"] for path in (predicted_file, measured_file))
    print(f"{'case':34s} {'allocated MiB':>14s} {'error':>9s} {'reserved MiB':>14s} {'error':>9s}  stated")
    for name, row in measured.items():
        forecast = predicted.get(name)
        if forecast is None or "error" in row or "error" in forecast:
            print(f"{name:34s} {'not comparable':>14s}: {shown(row if 'error' in row else forecast or {'error': '?'})}")
            continue
        cells = []
        for key in FIGURES[1:]:
            error = (forecast[key] - row[key]) / row[key] * 100
            cells.append(f"{row[key] / MIB:14.2f} {error:+8.3f}%")
        found, device = verdict(forecast, row), ""
        if "device_bytes" in row and "device_bytes" in forecast:
            error = (forecast["device_bytes"] - row["device_bytes"]) / row["device_bytes"] * 100
            device = f"  device {row['device_bytes'] / MIB:.1f} MiB {error:+.2f}%"
            found = "MISSED" if found == "ok" and abs(error) > MOST_OF_DEVICE else found
        print(f"{name:34s} {' '.join(cells)}  {found}{device}")
        missed += found == "MISSED"
    print(f"{missed} missed")
    return 1 if missed else 0


def verdict(forecast: dict[str, Any], row: dict[str, Any]) -> str:
    """0.1 % allocated and 1 % reserved; else, with convolutions, whether allocated lies in the range that was stated."""
    allocated, reserved = row["allocated_bytes"], row["reserved_bytes"]
    close = abs(forecast["allocated_bytes"] - allocated) <= 0.001 * allocated
    if close and abs(forecast["reserved_bytes"] - reserved) <= 0.01 * reserved:
        return "ok"
    low = forecast["allocated_bytes"] - forecast.get("below_bytes", 0)
    high = forecast["allocated_bytes"] + forecast.get("above_bytes", 0)
    return "inside" if forecast.get("below_bytes") and low <= allocated <= high else "MISSED"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("predict", "measure"):
        one = verbs.add_parser(verb)
        one.add_argument("--only", default="", help="cases whose name contains one of these, comma separated")
        one.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
        one.add_argument("--out", type=Path, default=Path("benchmarks"))
        one.add_argument("--gpu", default="h200", help="card to simulate, or the name of the file of a measured one")
    one = verbs.add_parser("judge")
    one.add_argument("predicted", type=Path)
    one.add_argument("measured", type=Path)
    one = verbs.add_parser("here")
    one.add_argument("name")
    one.add_argument("card", nargs="?")
    args = parser.parse_args()
    if args.verb in ("predict", "measure"):
        args.out.mkdir(parents=True, exist_ok=True)
        kind = "predicted" if args.verb == "predict" else "measured"
        args.target = args.out / f"{datetime.date.today()}_{args.gpu}_foreign_{kind}.json"
    return args


def main() -> int:
    args = parse()
    actions: dict[str, Callable[[], int]] = {
        "predict": lambda: collect(args, args.gpu),
        "measure": lambda: collect(args, None),
        "judge": lambda: judge(args.predicted, args.measured),
        "here": lambda: here(args.name, args.card),
    }
    return actions[args.verb]()


if __name__ == "__main__":
    sys.exit(main())

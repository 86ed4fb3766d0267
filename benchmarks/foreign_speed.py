"""What a simulation of other people's code costs: time of a tiled 480P decode of Wan's VAE and of Flux's transformer, RAM of a pipeline.

    python benchmarks/foreign_speed.py                  writes <out>/<date>_foreign_speed.json; exit code 1 over a bound
    python benchmarks/foreign_speed.py --only decode

An operation is one that makes or changes a tensor; views are not counted, their time is. Seconds are of the processor, the best of
nine simulations, the first of which imports: other programs on the processor only ever add. RAM is the peak of the resident set of
`wanvram estimate --diffusers` as typed: a folder of configurations of WanPipeline, 14B, 720P, 81 frames. Needs diffusers; no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foreign_cases import UMT5, UNIPC, flux, vae
from provenance import circumstances, unused

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
ESTIMATE = "estimate-wan-14b-720p-81"
MOST_RAM_BYTES = 3 * 2**29
# As the folder of Wan2.1-T2V-14B-Diffusers without weights: the classes' own defaults are of 14B. None: no file.
WAN_14B: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "scheduler": ("diffusers", "UniPCMultistepScheduler", UNIPC),
    "text_encoder": ("transformers", "UMT5EncoderModel", UMT5),
    "tokenizer": ("transformers", "T5TokenizerFast", None),
    "transformer": ("diffusers", "WanTransformer3DModel", {}),
    "vae": ("diffusers", "AutoencoderKLWan", {}),
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


def timed(make: Callable[[], Callable[[], Any]], most_seconds: float, most_us: float) -> dict[str, Any]:
    return measured(make) | {"most_seconds": most_seconds, "most_us_per_operation": most_us}


def estimated() -> dict[str, Any]:
    """The command, its peak of RAM and the seconds of the processor, in a process of its own. SystemExit if it fails."""
    with TemporaryDirectory() as directory:
        folder = Path(directory) / "Wan2.1-T2V-14B-Diffusers"
        for name, (_, _, config) in WAN_14B.items():
            (folder / name).mkdir(parents=True)
            if config is not None:
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                (folder / name / file).write_text(json.dumps(config))
        index = {"_class_name": "WanPipeline"} | {name: part[:2] for name, part in WAN_14B.items()}
        (folder / "model_index.json").write_text(json.dumps(index))
        said = ["--diffusers", folder.name, "--height", "720", "--width", "1280", "--num_frames", "81"]
        command = ["wanvram", "estimate", *said, "--offload", "model", "--gpu", "h200", "--json"]
        with subprocess.Popen([sys.executable, "-m", *command], cwd=directory, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            report = json.load(process.stdout)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    ram = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {"command": " ".join(command), "peak_ram_bytes": ram, "seconds": round(usage.ru_utime + usage.ru_stime, 1)}
    return row | {"most_peak_ram_bytes": MOST_RAM_BYTES, "peak": report["peak"]}


def kept(row: dict[str, Any]) -> bool:
    """Whether every figure that has a `most_` keeps to it."""
    return all(row[bound.removeprefix("most_")] <= row[bound] for bound in row if bound.startswith("most_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    named: dict[str, Callable[[], dict[str, Any]]] = {name: partial(timed, *case) for name, case in CASES.items()}
    named[ESTIMATE] = estimated
    rows: dict[str, Any] = {}
    for name, case in named.items():
        if args.only in name:
            row = case()
            rows[name] = row | {"ok": kept(row)}
            found = f"{row['peak_ram_bytes'] / 2**30:.3f} GiB of RAM" if name == ESTIMATE else ""
            found = found or f"{row['us_per_operation']:.1f} us per operation"
            print(f"{name:24s} {row['seconds']:7.2f} s  {found}  {'ok' if kept(row) else 'OVER ITS BOUND'}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    target = unused(args.out / f"{datetime.date.today()}_foreign_speed.json")
    about = {"date": str(datetime.date.today()), **circumstances("foreign_speed.py", "foreign_cases.py")}
    target.write_text(json.dumps(about | {"cases": rows}, indent=1) + "\n")
    print(f"Wrote {target}")
    sys.exit(not rows or not all(row["ok"] for row in rows.values()))


if __name__ == "__main__":
    main()

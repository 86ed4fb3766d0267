"""Whole runs under a hard memory cap: does a video fit the card, what does it cost in time, was it predicted?

    python benchmarks/fit_card.py                         every case
    python benchmarks/fit_card.py --only 14B-832x480      some
    python benchmarks/fit_card.py --no-resident           without the resident run beside it

Every case runs in a fresh process on the GPU with random full-size weights: T5, 4 steps, VAE, under the allocator's cap
(`--vram`). Device memory is what NVML reports for the whole GPU, sampled every 10 ms by this process, less what it reported
before the case began; it includes the CUDA context. After it, in the same process and without a cap, the resident run gives the
step time to compare with. The case is predicted by the simulated device as well. Writes <out>/<date>_<gpu>_fit_card.json.

Exit code 1 when a case exceeds its cap, fails or dies (it is a row), takes over 1.05 times the resident step, or is predicted
worse than 0.5 % of allocated, 1 % of reserved and 3 % of device memory and 7 % of a steady step (15 % from disk).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nvml_watch import gpu_of
from provenance import conclude, header, steady_step, unused

GIB = 2**30
MIB = 2**20
BOUNDS = {"allocated": 0.005, "reserved": 0.01, "device": 0.03}
MOST_OVER_RESIDENT = 1.05
MOST_STEP_ERROR, MOST_STEP_ERROR_FROM_DISK = 0.07, 0.15


def case(task: str, size: str, limit_gib: float, tile: int, resident_steps: int, **strategy: Any) -> dict[str, Any]:
    return {
        "name": f"{task}-{size.replace('*', 'x')}-{limit_gib:g}GiB" + "".join(f"-{v}" for v in strategy.values()),
        "limit_bytes": int(limit_gib * GIB),
        "resident_steps": resident_steps,
        "config": {
            "name": task,
            "description": "fit_card",
            "model_config": {"precision": "bf16", "load_strategy": "block", "offload": True},
            "optimization": {"vae_tile": tile, "expandable_segments": True} | strategy,
            "logging": {"log_interval": 4},
            "request": {"task": task, "size": size, "sample_steps": 4, "base_seed": 1, "weights": "random"},
        },
    }


CASES = [
    case("t2v-1.3B", "832*480", 2, 30, 4),
    case("t2v-14B", "832*480", 4, 52, 2),
    case("t2v-14B", "1280*720", 6, 52, 2),
    case("i2v-14B", "1280*720", 8, 52, 2),
    case("vace-14B", "1280*720", 8, 52, 2),
    case("flf2v-14B", "1280*720", 8, 52, 2),
    case("vace-1.3B", "832*480", 2.5, 30, 4),
    case("t2i-14B", "1280*720", 3, 52, 4),
]


class Sampler:
    """The highest memory NVML saw on the GPU since the start, less what was there before."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.idle = self.highest = self._read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _read(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.highest = max(self.highest, self._read())

    def close(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.highest - self.idle


def run_here() -> None:
    """In the fresh process: the case from a line of the input, the capped run, a line, the resident run, a line."""
    from dataclasses import replace

    import torch

    from wanvram.config import RunConfig, Strategy
    from wanvram.run.execute import Output, execute

    case = json.loads(sys.stdin.readline())
    config = RunConfig.from_dict(case["config"])
    record = execute(replace(config, device="cuda", memory_limit_bytes=case["limit_bytes"]), Output(None))
    print("CAPPED " + json.dumps(record.to_json()), flush=True)
    if case["resident_steps"]:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        request = replace(config.request, sample_steps=case["resident_steps"], frame_num=config.request.frame_num)
        strategy = Strategy(load_strategy="full", offload=True, expandable_segments=True)
        plain = replace(config, device="cuda", strategy=strategy, request=request)
        print("RESIDENT " + json.dumps(execute(plain, Output(None)).to_json()), flush=True)


def fresh_process() -> subprocess.Popen[str]:
    """Imports what a run needs and waits for a case, without touching the GPU."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__, "--here"], text=True, **pipes)


def measure(case: dict[str, Any], process: subprocess.Popen[str] | None = None) -> dict[str, Any]:
    """The case's records and NVML's peak. Raises RuntimeError with the end of what the process wrote if it failed."""
    process = process or fresh_process()
    sampler = Sampler()
    records: dict[str, Any] = {}
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdin.write(json.dumps(case) + "\n")
    process.stdin.close()
    for line in process.stdout:
        kind, _, text = line.partition(" ")
        if kind in ("CAPPED", "RESIDENT"):
            records[kind] = json.loads(text)
            if kind == "CAPPED":
                records["nvml_bytes"] = sampler.close()
    errors = process.stderr.read()[-3000:] if process.stderr else ""
    if process.wait() != 0 or "CAPPED" not in records:
        raise RuntimeError(f"{case['name']}: {errors}")
    return records


def predict(case: dict[str, Any], gpu: str) -> dict[str, Any]:
    from dataclasses import replace

    from wanvram.config import RunConfig
    from wanvram.predict.simulate import simulate

    config = replace(RunConfig.from_dict(case["config"]), device="simulated", gpu=gpu)
    return simulate(replace(config, memory_limit_bytes=case["limit_bytes"]))[0].to_json()


def row(case: dict[str, Any], records: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    capped, resident = records["CAPPED"], records.get("RESIDENT")
    stages = []
    for index, stage in enumerate(capped["stages"]):
        other = predicted["stages"][index] if index < len(predicted["stages"]) else {}
        stages.append(
            {"stage": stage["name"], "seconds": stage["seconds"], "predicted_seconds": other.get("seconds")}
            | {
                q: {"predicted": other.get(f"peak_{q}_bytes"), "measured": stage[f"peak_{q}_bytes"]}
                for q in ("allocated", "reserved", "device")
            }
        )
    return {
        "name": case["name"],
        "limit_bytes": case["limit_bytes"],
        "nvml_peak_bytes": records["nvml_bytes"],
        "device_peak_bytes": capped["peak"]["device_bytes"],
        "predicted_device_bytes": predicted["peak"]["device_bytes"],
        "failure": capped["failure"],
        "attention": capped["attention"]["taken"],
        "step_seconds": steady_step(capped),
        "predicted_step_seconds": steady_step(predicted),
        "resident_step_seconds": steady_step(resident) if resident else None,
        "resident_device_bytes": resident["peak"]["device_bytes"] if resident else None,
        "resident_stages": {s["name"]: s["seconds"] for s in resident["stages"]} if resident else None,
        "components": capped["components"],
        "host": capped["host"],
        "stages": stages,
        "config": case["config"],
    }


def breaches_of(r: dict[str, Any]) -> list[str]:
    """A sentence for each bound that a row misses."""
    name = r["name"]
    if "error" in r:
        return [f"{name}: died: {r['error'].strip().splitlines()[-1] if r['error'].strip() else 'without a word'}"]
    found = [f"{name}: {r['failure']['message']}"] if r["failure"] else []
    if r["nvml_peak_bytes"] > r["limit_bytes"]:
        found.append(f"{name}: {r['nvml_peak_bytes'] / MIB:.0f} MiB of the {r['limit_bytes'] / MIB:.0f} it may have")
    for stage in r["stages"]:
        for quantity, bound in BOUNDS.items():
            cell = stage[quantity]
            if cell["measured"] and abs((cell["predicted"] or 0) / cell["measured"] - 1) > bound:
                error = (cell["predicted"] or 0) / cell["measured"] - 1
                found.append(f"{name}: {stage['stage']} {quantity} {error:+.2%}, at most {bound:.1%}")
    whole = r["predicted_device_bytes"] / r["nvml_peak_bytes"] - 1
    if abs(whole) > BOUNDS["device"]:
        found.append(f"{name}: the card's memory {whole:+.2%}, at most {BOUNDS['device']:.0%}")
    step, resident, coming = r["step_seconds"], r["resident_step_seconds"], r["predicted_step_seconds"]
    if step and resident and step > MOST_OVER_RESIDENT * resident:
        found.append(f"{name}: a step of {step / resident:.3f} times the resident one, at most {MOST_OVER_RESIDENT}")
    disk = r["config"]["optimization"].get("weights_in") == "disk"
    most = MOST_STEP_ERROR_FROM_DISK if disk else MOST_STEP_ERROR
    if step and (not coming or abs(coming / step - 1) > most):
        found.append(f"{name}: a step of {step:.3f} s, {coming} predicted: at most {most:.0%} off")
    return found


def show(r: dict[str, Any]) -> None:
    step, resident = r["step_seconds"], r["resident_step_seconds"]
    ratio = f" = {step / resident:.3f} x resident {resident:.3f} s" if step and resident else ""
    fits = "fits" if r["nvml_peak_bytes"] <= r["limit_bytes"] and not r["failure"] else "FAILS"
    print(
        f"{r['name']}: {fits}; NVML {r['nvml_peak_bytes'] / MIB:.0f} of {r['limit_bytes'] / MIB:.0f} MiB, own figure "
        f"{r['device_peak_bytes'] / MIB:.0f}, predicted {r['predicted_device_bytes'] / MIB:.0f}; "
        f"step {step and round(step, 3)} s{ratio}, predicted {r['predicted_step_seconds']}; pinned "
        f"{r['host']['pinned_bytes'] / GIB:.1f} GiB, RSS {r['host']['peak_rss_bytes'] / GIB:.1f} GiB; {r['failure'] or ''}"
    )
    for s in r["stages"]:
        cells = [
            f"{q} {(s[q]['predicted'] or 0) / MIB:8.1f}/{s[q]['measured'] / MIB:8.1f} "
            f"{((s[q]['predicted'] or 0) / s[q]['measured'] - 1) if s[q]['measured'] else 0:+.2%}"
            for q in ("allocated", "reserved", "device")
        ]
        print(f"    {s['stage']:20s} {'  '.join(cells)}  {s['seconds']:.2f} s (predicted {s['predicted_seconds']})")
    for c in r["components"]:
        if c.get("streamed_bytes"):
            print(f"    streamed {c['name']}: {c['streamed_bytes'] / GIB:.1f} GiB, hidden {c.get('hidden_share')}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains one of these, comma separated")
    parser.add_argument(
        "--weights", default="random", help="or a checkpoint directory (benchmarks/random_checkpoint.py)"
    )
    parser.add_argument("--weights_in", default="pinned", choices=("pinned", "pageable", "disk"))
    parser.add_argument("--no-resident", action="store_true")
    parser.add_argument("--gpu", default="h200", help="key of the simulated card")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        run_here()
        return 0
    import torch

    start, rows = time.monotonic(), []
    about = header("fit_card.py")
    home = "" if args.weights_in == "pinned" else f"_{args.weights_in}"
    target = unused(args.out / f"{datetime.date.today()}_{args.gpu}_fit_card{home}.json")
    breaches: list[str] = []
    for item in CASES:
        if not any(part in item["name"] for part in args.only.split(",")) or time.monotonic() - start > args.seconds:
            continue
        chosen = item | ({"resident_steps": 0} if args.no_resident else {})
        chosen["config"]["request"]["weights"] = args.weights
        chosen["config"]["optimization"]["weights_in"] = args.weights_in
        try:
            rows.append(row(chosen, measure(chosen), predict(chosen, args.gpu)))
        except RuntimeError as error:
            print(f"{item['name']}: {error}", flush=True)
            rows.append({"name": item["name"], "config": chosen["config"], "error": str(error)})
        else:
            show(rows[-1])
        breaches += breaches_of(rows[-1])
        document = about | {"device": torch.cuda.get_device_name(), "breaches": breaches, "cases": rows}
        target.write_text(json.dumps(document, indent=1) + "\n")
    if not rows:
        breaches.append(f"--only {args.only} left no case")
    return conclude({"cases": len(rows), "breaches": breaches})


if __name__ == "__main__":
    sys.exit(main())

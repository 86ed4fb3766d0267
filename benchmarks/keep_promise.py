"""Does the planner keep its promise? Random requests and budgets, planned without a GPU, then run under the budget as a hard cap.

    python benchmarks/keep_promise.py plan cases.json --count 44         anywhere: draws and plans, minutes of CPU
    python benchmarks/keep_promise.py run cases.json --out benchmarks    on the GPU

Drawn uniformly: task, size and frames (4n+1 up to 81) of it; log-uniformly: a budget between 2 and 80 GiB. A draw whose
predicted run of 2 steps takes longer than --longest seconds is drawn again (the machine is lent by the minute), a refusal of the
planner counts as a case too: its smallest budget must be above the one asked for. Every case runs T5, 2 steps (6 if they are
short) and the VAE with random weights under the cap. Device memory is NVML's for the whole GPU, less what was used before this
process began.

Each case has a process of its own, which imports what it needs while the case before it runs and touches the GPU afterwards.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from fit_card import GIB, MIB, fresh_process, measure, steady_step

from wanvram.config import Request, RunConfig
from wanvram.specs import DIT
from wanvram.tasks import TASKS

SEED = 20261124
SHORT_STEP = 1.0  # seconds


def draw(rng: random.Random, longest: float) -> tuple[RunConfig, int]:
    while True:
        config, budget = draw_any(rng)
        if roughly_seconds(config.request) <= longest:
            return config, budget


def roughly_seconds(request: Request) -> float:
    """Of two steps, from arithmetic alone: saves planning what would be thrown away."""
    spec = DIT[TASKS[request.task].dit]
    tokens = request.width * request.height // 256 * (1 + (request.frame_num - 1) // 4)
    products = 2 * tokens * (6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim) * (spec.num_layers + len(spec.vace_layers))
    attention = 4 * tokens**2 * spec.dim * (spec.num_layers + len(spec.vace_layers))
    return 4 * (products + attention) / 5e14


def draw_any(rng: random.Random) -> tuple[RunConfig, int]:
    task = rng.choice(sorted(TASKS))
    size = rng.choice(TASKS[task].sizes)
    frames = 1 if TASKS[task].frames == 1 else 4 * rng.randint(1, 20) + 1
    budget = int(2.0 * (80 / 2) ** rng.random() * GIB)
    request = Request.for_task(task, size=size, frame_num=frames, sample_steps=2, base_seed=1)
    return RunConfig(
        name=f"{task}-{size.replace('*', 'x')}-{frames}", description="", device="cuda", request=request
    ), budget


def plan_case(config: RunConfig, budget_bytes: int) -> dict[str, Any]:
    """Short steps are repeated: the first is not counted, and the second alone would still hold first uses."""
    case = plan_as_it_is(config, budget_bytes)
    if "refused" in case or case["predicted_step_seconds"] >= SHORT_STEP:
        return case
    longer = plan_as_it_is(replace(config, request=replace(config.request, sample_steps=6)), budget_bytes)
    return longer | {"seconds": case["seconds"]}  # what a case is chosen by


def plan_as_it_is(config: RunConfig, budget_bytes: int) -> dict[str, Any]:
    from wanvram.planner import Budget, Refusal
    from wanvram.run.planning import plan_run, planned_config

    start = time.monotonic()
    result, record = plan_run(config, Budget(budget_bytes), offers=False)
    case: dict[str, Any] = {"budget_bytes": budget_bytes, "plan_seconds": time.monotonic() - start}
    if isinstance(result, Refusal) or record is None:
        return case | {"name": config.name, "refused": result.message, "seconds": 0.0}
    planned = replace(planned_config(config, result), device="cuda", gpu=None)
    data = record.to_json()
    seconds = sum(s["seconds"] or 0.0 for s in data["stages"])
    return case | {"name": config.name, "config": planned.to_dict(), "predicted": data["peak"], "seconds": seconds,
                   "predicted_step_seconds": steady_step(data)}  # fmt: skip


def plan_cases(target: Path, count: int, longest: float, processes: int) -> None:
    rng, cases = random.Random(SEED), []
    with ProcessPoolExecutor(processes) as pool:
        while len(cases) < count:
            drawn = [draw(rng, longest) for _ in range(2 * processes)]
            for case in pool.map(plan_case, *zip(*drawn, strict=True)):
                if case["seconds"] <= longest and len(cases) < count:
                    cases.append(case)
                    print(f"{len(cases)}: {case['name']} in {case['budget_bytes'] / GIB:.1f} GiB: "
                          f"{case.get('refused') or round(case['seconds'], 1)}", flush=True)  # fmt: skip
            target.write_text(json.dumps(cases, indent=1) + "\n")


def run_case(case: dict[str, Any], process: subprocess.Popen[str]) -> dict[str, Any]:
    """In a fresh process: what one run leaves behind (libraries, a cap, a failed run's tensors) is no part of another."""
    records = measure(case | {"limit_bytes": case["budget_bytes"], "resident_steps": 0}, process)
    record, nvml = records["CAPPED"], records["nvml_bytes"]
    predicted = case["predicted"]["device_bytes"]
    return case | {
        "measured": record["peak"],
        "nvml_bytes": nvml,
        "failure": record["failure"],
        "step_seconds": steady_step(record),
        "stages": {s["name"]: s["seconds"] for s in record["stages"]},
        "kept": record["failure"] is None and nvml <= case["budget_bytes"],
        "error": predicted / record["peak"]["device_bytes"] - 1,
        "error_nvml": predicted / nvml - 1,
    }


def run_cases(cases: list[dict[str, Any]], out: Path, seconds: float) -> None:
    import torch

    start, rows = time.monotonic(), []
    target = out / f"{datetime.date.today()}_h200_keep_promise.json"
    rows += [case for case in cases if "refused" in case]
    waiting = fresh_process()
    for case in (case for case in cases if "refused" not in case):
        if time.monotonic() - start > seconds:
            break
        process, waiting = waiting, fresh_process()
        try:
            rows.append(run_case(case, process))
        except RuntimeError as error:
            print(error, flush=True)
            rows.append(case | {"kept": False, "failure": str(error)[-500:]})
            continue
        r = rows[-1]
        print(
            f"{r['name']:28s} budget {r['budget_bytes'] / GIB:6.2f} GiB: NVML {r['nvml_bytes'] / MIB:8.0f}, own "
            f"{r['measured']['device_bytes'] / MIB:8.0f}, predicted {r['predicted']['device_bytes'] / MIB:8.0f} MiB "
            f"({r['error']:+.2%}); step {r['step_seconds']} s, predicted {r['predicted_step_seconds']}; "
            f"{'kept' if r['kept'] else 'BROKEN ' + str(r['failure'])}",
            flush=True,
        )
        document = {"device": torch.cuda.get_device_name(), "date": str(datetime.date.today()), "cases": rows}
        target.write_text(json.dumps(document, indent=1) + "\n")
    waiting.kill()
    run = [r for r in rows if "error" in r]
    steps = [r["predicted_step_seconds"] / r["step_seconds"] - 1 for r in run if r["step_seconds"]]
    print(f"{len(rows)} cases, {len(run)} run, {sum(r['kept'] for r in run)} kept; device error "
          f"{min(r['error'] for r in run):+.2%} to {max(r['error'] for r in run):+.2%}; of NVML's figure "
          f"{min(r['error_nvml'] for r in run):+.2%} to {max(r['error_nvml'] for r in run):+.2%}; "
          f"step time {min(steps):+.1%} to {max(steps):+.1%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("cases", type=Path)
    parser.add_argument("--count", type=int, default=44)
    parser.add_argument("--longest", type=float, default=8.0, help="predicted seconds of a case at most")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="numbers of cases in the file, comma separated")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    args = parser.parse_args()
    if args.what == "plan":
        plan_cases(args.cases, args.count, args.longest, args.processes)
    else:
        cases = json.loads(args.cases.read_text())
        chosen = [cases[int(number)] for number in args.only.split(",")] if args.only else cases
        run_cases(chosen, args.out, args.seconds)


if __name__ == "__main__":
    sys.exit(main())

"""What products in 8 bits are worth and what they cost: single products, a forward against float32, whole denoising steps in pairs.

    python benchmarks/fp8_products.py --only products,numerics --out a.json                      2 minutes
    python benchmarks/fp8_products.py --only 14B-720P --steps 3 --out b.json                     one pair; 4 minutes
    python benchmarks/fp8_products.py list                                                       parts and bounds; no GPU

`products` takes every product of a block at the rows of a chunk in bf16 (torch.addmm) and in 8 bits (kernels.scaled_products), the
quantising of its rows apart, with SM clock and power, the error of each against float64, and what the allocator is asked for besides.
`numerics` takes one forward of the tiny transformer, of 1.3B (14040 tokens) and of 14B (4680) in float32, bf16 and bf16 with 8-bit
products: root mean square of the error, relative, and as a multiple of bf16's. Weights are random and have no outliers, so a trained
model's error may be another; they are taken as whole runs have them, and larger, so that the blocks matter. `1.3B-480P`, `14B-480P`,
`14B-720P` are whole runs of `wanvram profile` in fresh processes as in attention_backends.py, with product_precision same and fp8 in
turns, each beside its prediction.

Expected, written before the first run: 0.62 of the peak in 8 bits (1227 TFLOP/s at an H200's sustained clock); 10 to 20 times bf16's
error where the blocks matter (11 times, 7.2 %, of the tiny one on a CPU); a step of 17.72 s instead of 19.77 for 14B 720P, of 4.32
instead of 5.18 for 14B 480P, of 0.84 instead of 0.91 for 1.3B. Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from attention_backends import CASES, Case, Row, profile, run_beside, said, sampled, steps_of, timed
from nvml_watch import gpu_facts, gpu_of
from provenance import ResultFile, circumstances, conclude, rows_of_a_process, say_row

__all__ = ["judge"]

SCRIPTS = ("fp8_products.py", "attention_backends.py", "numerics.py", "nvml_watch.py", "provenance.py")
PRECISIONS = ("same", "fp8")  # of products
PARTS = ("products", "numerics", *(case.name for case in CASES))
# (rows, inputs, outputs): of 14B at 1280x720 and of 1.3B at 832x480, chunk by chunk.
SHAPES = (
    (8400, 5120, 5120),
    (8400, 5120, 13824),
    (8400, 13824, 5120),
    (8190, 1536, 1536),
    (8190, 1536, 8960),
    (8190, 8960, 1536),
)
LARGE = 5120  # inputs and outputs of the shapes whose rate the clock of the simulator is about
# `random` as in whole runs, where blocks add little to the stream that they read; `unit`, where they add as much as it has.
WEIGHTS = ("random", "unit")
FORWARDS = (("tiny", "tiny-t2v", (5, 12, 20)), ("1.3B", "t2v-1.3B", (9, 60, 104)), ("14B", "t2v-14B", (3, 60, 104)))

# Bounds of the project's issue 16, "What it must show", 5 and 3.
LEAST_FASTER = {"14B-720P": 1.08}  # times as fast as bf16
MOST_STEP_ERROR = 0.05  # of predicted against measured steps
LEAST_EXACT = 0.95  # of stages whose allocated and reserved peaks are predicted to the byte
MOST_RATE_ERROR = 0.10  # of the share that the clock counts, over the large shapes together


# --- judging: pure, of rows -----------------------------------------------------------------------------------------------------


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows show, and `breaches`: every bound that was missed."""
    breaches: list[str] = []
    products = [row for row in rows if row["part"] == "products"]
    rates = [row for row in products if min(row["shape"][1:]) >= LARGE]
    share = None
    if rates:
        share = sum(row["flops"] for row in rates) / sum(row["fp8_seconds"] for row in rates) / rates[0]["peak_flops"]
        counted = rates[0]["counted_share"]
        if abs(share / counted - 1) > MOST_RATE_ERROR:
            breaches.append(f"products: {share:.3f} of the peak in 8 bits, {counted} is counted")
    breaches += [
        f"products {row['shape']}: {row['extra_bytes']} bytes beside the output"
        for row in products
        if row["extra_bytes"]
    ]
    errors = {(row["model"], row["precision"]): row["rms"] for row in rows if row["part"] == "numerics"}
    multiples = {name: errors[name, "fp8"] / errors[name, "bf16"] for name, kind in errors if kind == "fp8"}
    breaches += [f"numerics {name}: {multiple}" for name, multiple in multiples.items() if not math.isfinite(multiple)]
    steps: dict[str, Any] = {}
    for case in CASES:
        mine = [row for row in rows if row["part"] == case.name]
        if mine:
            steps[case.name] = _steps(mine)
            breaches += [f"{case.name}: {text}" for text in _missed(case, mine, steps[case.name])]
    return {
        "share_of_peak": share,
        "forward_rms": {" ".join(k): v for k, v in errors.items()},
        "times_bf16": multiples,
    } | {
        "steps": steps,
        "breaches": breaches,
    }


def _steps(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        runs = [row for row in rows if row["precision"] == precision and row["failure"] is None]
        stages = [stage for row in runs for stage in row["stages"]]
        if runs:
            found[precision] = {
                "runs": len(runs),
                "step_seconds": median(row["step_seconds"] for row in runs),
                "predicted_seconds": runs[0]["predicted_step_seconds"],
                "device_bytes": max(row["nvml_bytes"] for row in runs),
                "exact_share": sum(s["allocated"] == s["reserved"] == 0 for s in stages) / len(stages),
            }
    if len(found) == len(PRECISIONS):
        found["times_as_fast"] = found["same"]["step_seconds"] / found["fp8"]["step_seconds"]
    return found


def _missed(case: Case, rows: Sequence[Row], found: Mapping[str, Any]) -> list[str]:
    missed = [f"{row['precision']} failed: {row['failure']}" for row in rows if row["failure"]]
    for precision in (p for p in PRECISIONS if p in found):
        mine = found[precision]
        error = mine["predicted_seconds"] / mine["step_seconds"] - 1
        if abs(error) > MOST_STEP_ERROR:
            missed.append(f"{precision}: a step of {mine['step_seconds']:.3f} s was predicted {error:+.1%}")
        if mine["exact_share"] < LEAST_EXACT:
            missed.append(f"{precision}: {mine['exact_share']:.2f} of stage peaks to the byte, at least {LEAST_EXACT}")
    least, fast = LEAST_FASTER.get(case.name), found.get("times_as_fast")
    if least is not None and (fast is None or fast < least):
        missed.append(f"8 bits are {'never' if fast is None else f'{fast:.3f} times'} as fast, at least {least}")
    return missed


# --- single products, in a process of their own ---------------------------------------------------------------------------------


def products_here(say: Callable[[Row], None]) -> None:
    import torch

    from wanvram.kernels.scaled_products import quantise_rows, scaled_product, scaled_rows
    from wanvram.simulate.gpus import find_gpu

    card = find_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    for rows, inputs, outputs in SHAPES:
        x = torch.randn((rows, inputs), device="cuda").bfloat16()
        weight, bias = (
            torch.randn((outputs, inputs), device="cuda").mul_(0.02).bfloat16(),
            torch.zeros(outputs, device="cuda").bfloat16(),
        )
        left, right = scaled_rows(x), scaled_rows(weight)
        out = torch.empty((rows, outputs), dtype=torch.bfloat16, device="cuda")
        calls: dict[str, Callable[[], Any]] = {
            "bf16": lambda: torch.addmm(bias, x, weight.t(), out=out),  # noqa: B023
            "fp8": lambda: scaled_product(left, right.values, right.scales, bias, out),  # noqa: B023
            "quantise": lambda: quantise_rows(x, left.values, left.scales),  # noqa: B023
        }
        exact = x[:64].double() @ weight.double().t()
        row: Row = {
            "part": "products",
            "kind": "call",
            "shape": [rows, inputs, outputs],
            "flops": 2.0 * rows * inputs * outputs,
        }
        row |= {"peak_flops": (card.fp8_flops or 0.0) * card.clock_ratio, "counted_share": card.efficiency.product_fp8}
        for name, call in calls.items():
            once = timed(torch, call, 1)
            with sampled(row):
                row[f"{name}_seconds"] = timed(torch, call, max(8, math.ceil(1.0 / once)))
            if name != "quantise":
                apart = out[:64].double() - exact
                row[f"{name}_error"] = float(apart.square().mean().sqrt() / exact.square().mean().sqrt())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls["fp8"]()
        torch.cuda.synchronize()
        del row["nvml_bytes"]
        say(row | {"extra_bytes": torch.cuda.max_memory_allocated() - before})


# --- a forward against float32, in a process of its own -------------------------------------------------------------------------


def numerics_here(say: Callable[[Row], None], forwards: Sequence[Any] = FORWARDS, device: str = "cuda") -> None:
    import torch
    from numerics import error, inputs_of

    from wanvram.models.dit import Attending, Condition, WanDiT
    from wanvram.models.precision import PRECISIONS as DTYPES
    from wanvram.specs import DIT
    from wanvram.weights.random import RandomSource

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def forward(model: Any, latent: Any, context: Any, backend: str) -> Any:
        (moment,), conditions = model.prepare([500], [Condition(context)])
        (velocity,) = model.velocity(
            [latent], moment, conditions, rows_per_chunk=8192, attending=Attending(backend=backend)
        )
        return velocity.double().cpu()

    for (name, key, shape), weights in product(forwards, WEIGHTS):
        spec = DIT[key]
        latent, context = inputs_of(shape, spec, device)
        with torch.device(device):
            wide, model = (WanDiT(spec, DTYPES[precision]) for precision in ("fp32", "bf16"))
        source = RandomSource({k: tuple(p.shape) for k, p in wide.named_parameters()}, 0)
        for parameter, value in wide.named_parameters():
            source.fill(parameter, value.data)
            if weights == "unit" and not parameter.endswith("bias"):
                _to_unit(value.data)
            model.get_parameter(parameter).data.copy_(value)
        exact = forward(wide, latent, context, "efficient")
        del wide
        for precision in ("bf16", "fp8"):
            if precision == "fp8":
                _in_8_bits(torch, model)
            found = error(forward(model, latent, context, "auto"), exact)
            about = {"part": "numerics", "kind": "forward", "model": f"{name} {weights}", "precision": precision}
            say(about | found)
        del model


def _to_unit(weight: Any) -> None:
    """Drawn with a standard deviation of 0.02: matrices then keep the size of what they multiply, and gates are 0.5."""
    if weight.dim() == 3:  # modulation
        weight.mul_(25.0)
    elif weight.dim() == 2:
        weight.mul_(50.0 / weight.shape[1] ** 0.5)


def _in_8_bits(torch: Any, model: Any) -> None:
    """Every product of the blocks, as the engine puts them in place."""
    from wanvram.kernels.scaled_products import scaled_rows
    from wanvram.models.linear import Linear

    for block in model.blocks:
        for layer in (module for module in block.modules() if isinstance(module, Linear)):
            rows = scaled_rows(layer.weight)
            for name, value in (("weight", rows.values), ("scale", rows.scales)):
                layer._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


SINGLE = {"products": products_here, "numerics": numerics_here}


def here(part: str) -> int:
    SINGLE[part](say_row)
    return 0


# --- whole runs in pairs ----------------------------------------------------------------------------------------------------------


def config_of(case: Case, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    config = case.config(args.attention, args.steps)
    config["optimization"]["product_precision"] = precision
    return config | {"name": f"{case.name}-{precision}"}


def pairs(case: Case, args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    configs = {precision: config_of(case, precision, args) for precision in PRECISIONS}
    with ThreadPoolExecutor() as pool:
        asked = {p: pool.submit(profile, c, scratch, "simulated", "--gpu", args.gpu) for p, c in configs.items()}
    predicted = {}
    for precision, future in asked.items():
        record = future.result()
        if isinstance(record, str):
            raise SystemExit(f"{case.name} {precision}: no prediction: {record}")
        predicted[precision] = record
        print(f"{case.name} {precision}: predicted {steps_of(record)[1]:.3f} s a step", flush=True)
    for number in range(args.rounds):
        for precision in PRECISIONS if number % 2 == 0 else PRECISIONS[::-1]:
            about = {"part": case.name, "kind": "run", "precision": precision, "round": number}
            yield about | run_beside(configs[precision], predicted[precision], scratch)


# --- command line -----------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    import pynvml

    pynvml.nvmlInit()
    parts = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--only: {', '.join(sorted(unknown))} unknown; parts are {', '.join(PARTS)}")
    facts = gpu_facts(pynvml, gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES")))
    header = {
        "date": datetime.now(timezone.utc).isoformat(),
        "gpu": facts,
        "steps": args.steps,
        "attention": args.attention,
    }
    result = ResultFile(args.out, header | circumstances(*SCRIPTS), judge)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            case = next((case for case in CASES if case.name == part), None)
            for row in rows_of_a_process(__file__, part) if case is None else pairs(case, args, Path(folder)):
                result.append(row)
                print(_shown(row), flush=True)
    return conclude(judge(result.rows))


def _shown(row: Row) -> str:
    if row["part"] == "products":
        flops = row["flops"]
        rates = (f"{name} {flops / row[f'{name}_seconds'] / 1e12:.0f} TFLOP/s" for name in ("bf16", "fp8"))
        errors = (f"{name} {row[f'{name}_error']:.2e}" for name in ("bf16", "fp8"))
        quantise = f"rows quantised in {row['quantise_seconds'] * 1e6:.0f} us, the product takes {row['fp8_seconds'] * 1e6:.0f}"
        clock = f"{row['sm_clock_mhz']} MHz, {row['power_watt']} W"
        return f"products {row['shape']}: {', '.join(rates)}; {quantise}; error {', '.join(errors)}; {clock}"
    about = " ".join(str(row[name]) for name in ("model", "precision") if name in row)
    return f"{said(row)} {about}"


def main() -> int:
    if sys.argv[1:2] == ["--here"]:
        return here(sys.argv[2])
    if sys.argv[1:2] == ["list"]:
        print("\n".join([*PARTS, f"times as fast as bf16, at least: {LEAST_FASTER}"]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--steps", type=int, default=4, help="of whole runs; the first is not counted (default: 4)")
    parser.add_argument("--rounds", type=int, default=1, help="pairs of whole runs (default: 1)")
    parser.add_argument("--attention", default="fa4", help="backend of the whole runs (default: fa4)")
    parser.add_argument("--gpu", default="h200", help="card to predict for")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

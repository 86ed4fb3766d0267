"""Predicted against measured seconds: fitted on some files, judged on others; and the efficiencies that would bring them together.

    python benchmarks/calibrate_clock.py                        judges: files that the clock was not fitted on; exit code 1 beyond 7 % of
                                                                a steady step or 10 % of a decode
    python benchmarks/calibrate_clock.py FILE...                these instead: fit_card, predict_vs_measure, attention or beside_diffusers
                                                                JSONs, or record.json of a run on a GPU
    python benchmarks/calibrate_clock.py --fit                  suggests efficiencies from the files of FITTED (simulates each case once
                                                                per rate: minutes), then judges them on the others

The card is the one that a file's name says. Times marked * include what happens once in a process (loading libraries, compiling,
tuning) or is not on the clock (encoding the video): they are shown, neither fitted nor judged. Steps are means without the first. The
fit minimises relative errors with every rate held near its present value (one weight of `STIFFNESS` against one measurement), so a
rate that no measurement asks about stays. Decodes before 2026-11-30 are of other convolutions, and are left out. A warm time is
predicted for a process that has loaded every library and made every plan of cuDNN before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attention_backends import CASES as ATTENTION_CASES
from predict_vs_measure import BUILT_IN, SHORT
from provenance import attended, conclude, steady_step

from wanvram.config import RunConfig
from wanvram.predict.host import clock_of
from wanvram.predict.simulate import simulate
from wanvram.simulate.clock import Clock
from wanvram.simulate.gpus import GPU, GPUS, Efficiency

HERE = Path(__file__).parent
SIZES = {"1.3B": "832*480", "14B": "1280*720"}  # of beside_diffusers.py: 81 frames, bf16 resident, VAE in float32
RATES = tuple(f.name for f in fields(Efficiency))
STEP = "step"  # in place of a stage's name: a steady denoising step
BOUNDS = {STEP: 0.07, "decode": 0.10}
# What EFFICIENCY was fitted on (simulate/card.py), and what it is judged on: other runs, sizes, ways to hold the weights, another card.
FITTED = (
    "2026-11-24_beside_diffusers_*.json",
    "2026-11-30_h200_bf16_busy_tiled_vae.json",  # the kernels' time of 16-bit convolutions
    "2026-11-30_h200_short_2_predict_vs_measure.json",  # what issuing a product costs
)
JUDGED = (
    "*_fit_card.json",
    "*_h100_beside_diffusers_*B.json",
    "2026-11-30_beside_diffusers_1.3B.json",
    "*_attention_pairs*.json",
    "*_generate_720P_fa4.json",
    "2026-11-30_h200_tiled_vae_[45].json",
    "2026-11-30_h200_tiled_vae_bf16_2.json",
    "2026-11-30_h200_short_[34]_predict_vs_measure.json",  # before them, a streamed block was bound anew in every pass
)
PICTURES_SINCE = "2026-11-30"  # the VAE's convolutions in float32
STIFFNESS = 0.2
NUDGE = 0.05


@dataclass(frozen=True)
class Measured:
    """Seconds of a stage or a steady step. warm: nothing in it happened for the first time. card: that it ran on. operation_us: of its
    processor, where the file says it.
    """

    card: str
    label: str
    config: dict[str, Any]
    stage: str
    seconds: float
    warm: bool
    operation_us: float | None = None


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The resident run that fit_card.py makes after the capped one."""
    model = config["model_config"] | {"load_strategy": "full"}
    return config | {"model_config": model, "optimization": {"expandable_segments": True}}


def of_fit_card(card: str, document: dict[str, Any]) -> Iterator[Measured]:
    for case in document["cases"]:
        if "error" in case:
            continue
        label, backend = case["name"], case.get("attention")
        config = attended(case["config"], backend)
        if case["step_seconds"]:
            yield Measured(card, label, config, STEP, case["step_seconds"], True)
        for row in case["stages"]:
            yield Measured(card, label, config, row["stage"], row["seconds"], False)
        if case["resident_step_seconds"]:
            resident = attended(plain(config), backend)
            yield Measured(card, label + " resident", resident, STEP, case["resident_step_seconds"], True)
            # One picture's decode is over before cuDNN has a plan for its shapes, which tiles did not have.
            warm = document.get("date", "") >= PICTURES_SINCE and case["config"]["request"]["task"] != "t2i-14B"
            for stage, seconds in case["resident_stages"].items():
                yield Measured(card, label + " resident", resident, stage, seconds, stage == "decode" and warm)


def of_predict_vs_measure(card: str, document: list[dict[str, Any]]) -> Iterator[Measured]:
    configs = {case["name"]: case for case in BUILT_IN + SHORT}
    for run in document:
        config = attended(configs[run["config"]], run.get("attention")) if run["config"] in configs else None
        if config is None:
            continue
        speed = run.get("predicted_by", {}).get("operation_us")
        if run.get("step_seconds"):
            yield Measured(card, run["config"], config, STEP, run["step_seconds"], True, speed)
        for stage, seconds in run.get("seconds", {}).items():
            yield Measured(card, run["config"], config, stage, seconds, False)


def of_beside_diffusers(card: str, name: str, document: dict[str, Any]) -> Iterator[Measured]:
    model = next(model for model in SIZES if model in name)
    request = {"task": f"t2v-{model}", "size": SIZES[model], "sample_steps": 3, "weights": "random"}
    config = {"name": "beside", "model_config": {"precision": "bf16", "offload": True}, "request": request}
    config = attended(config, "fa4" if document.get("flash-attn-4") else None)
    yield Measured(card, name, config, STEP, document["our_dit"]["seconds"], True)
    yield Measured(
        card, name, config, "decode", document["our_vae"]["seconds"], document.get("date", "") >= PICTURES_SINCE
    )


def of_tiled_vae(card: str, document: dict[str, Any]) -> Iterator[Measured]:
    for row in document["rows"]:
        task = next(f"t2v-{model}" for model, size in SIZES.items() if size == row["size"])
        request = {"task": task, "size": row["size"], "sample_steps": 1, "weights": "random"}
        how = {"expandable_segments": True, "vae_precision": document.get("precision", "fp32")}
        how |= {"vae_tile": row["tile"]} if row["tile"] else {}
        model = {"precision": "bf16", "offload": True}
        config = {"name": "tiles", "model_config": model, "optimization": how, "request": request}
        if row["way"] == "decode" and document["frames"] == 81:
            yield Measured(card, f"decode {row['size']} tile {row['tile']}", config, "decode", row["seconds"], True)


def of_attention(card: str, document: dict[str, Any]) -> Iterator[Measured]:
    configs = {case.name: case for case in ATTENTION_CASES}
    for row in document["rows"]:
        if row["kind"] == "run" and row["failure"] is None and row["part"] in configs:
            config = configs[row["part"]].config(row["backend"])
            yield Measured(card, f"{row['part']} {row['backend']}", config, STEP, row["step_seconds"], True)


def of_record(card: str, name: str, document: dict[str, Any]) -> Iterator[Measured]:
    if document["simulated"]:
        raise SystemExit(f"{name} is a prediction; calibration needs a run on a GPU")
    step = steady_step(document)
    if step is not None:
        yield Measured(card, name, document["config"], STEP, step, True)
    for stage in document["stages"]:
        yield Measured(card, name, document["config"], stage["name"], stage["seconds"], False)


def read(path: Path, card: str | None = None) -> list[Measured]:
    document = json.loads(path.read_text())
    card = card or ("h100" if "_h100_" in path.name else "h200")
    if isinstance(document, list):
        found = of_predict_vs_measure(card, document)
    elif "cases" in document:
        found = of_fit_card(card, document)
    elif "our_dit" in document:
        found = of_beside_diffusers(card, path.stem, document)
    elif "stages" in document:
        found = of_record(card, str(path), document)
    elif any("tile" in row for row in document.get("rows", ())):
        found = of_tiled_vae(card, document)
    elif any(row.get("kind") == "run" for row in document.get("rows", ())):
        found = of_attention(card, document)
    else:
        raise SystemExit(f"{path}: neither a record nor a benchmark with seconds")
    speed = None if isinstance(document, list) else document.get("operation_us")
    return [replace(m, operation_us=m.operation_us or speed) for m in found if m.seconds]


def clock_on(operation_us: float | None, config: RunConfig, gpu: GPU, *, warm: bool = False) -> Clock:
    """On a machine whose processor is that fast, as a plan there would take it. warm: of a process that has done all of it before:
    libraries are loaded, and cuDNN has its plans.
    """
    clock = clock_of(config, gpu)
    machine = replace(clock.machine, operation_us=operation_us or clock.machine.operation_us)
    clock = replace(clock, machine=replace(machine, first_use={}) if warm else machine)
    if warm:
        clock.leave_out_plans()
    return clock


class Predictions:
    """Predicted seconds by card and configuration, each simulated once for the cards' present efficiency."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, float | None]] = {}

    def seconds(self, measured: Measured) -> float | None:
        speed = measured.operation_us
        key = f"{measured.card} {measured.warm} {speed} {json.dumps(measured.config, sort_keys=True)}"
        if key not in self._known:
            config = RunConfig.from_dict(json.loads(json.dumps(measured.config)))
            config = replace(config, device="simulated", gpu=measured.card, memory_limit_bytes=None)
            with mock.patch("wanvram.predict.simulate.clock_of", partial(clock_on, speed, warm=measured.warm)):
                record = simulate(config)[0].to_json()
            stages = {s["name"]: s["seconds"] for s in record["stages"]}
            self._known[key] = stages | {STEP: steady_step(record)}
        return self._known[key].get(measured.stage)

    def with_efficiency(self, efficiency: Efficiency) -> Predictions:
        """A fresh set, for another efficiency of the cards here."""
        for card in ("h100", "h200"):
            GPUS[card] = replace(GPUS[card], efficiency=efficiency)
        return Predictions()


def show(measurements: Sequence[Measured], predictions: Predictions) -> None:
    label = None
    for m in measurements:
        predicted = predictions.seconds(m)
        if predicted is None:
            continue
        if m.label != label:
            label = m.label
            print(f"\n{label}")
        star = " " if m.warm else "*"
        error = f"{predicted / m.seconds - 1:+7.1%}"
        print(f"  {m.stage:16s} predicted {predicted:8.3f} s   measured {m.seconds:8.3f} s{star}  {error}", flush=True)


def judged(measurements: Sequence[Measured], predictions: Predictions) -> dict[str, Any]:
    """Of warm times: how many are within their bound, the worst of each kind, and a sentence for each beyond."""
    errors: dict[str, list[float]] = {stage: [] for stage in BOUNDS}
    breaches = []
    for m in measurements:
        predicted = predictions.seconds(m) if m.warm and m.stage in BOUNDS else None
        if predicted is None:
            continue
        error = predicted / m.seconds - 1
        errors[m.stage].append(error)
        if abs(error) > BOUNDS[m.stage]:
            breaches.append(f"{m.card} {m.label}: {m.stage} {error:+.1%}, at most {BOUNDS[m.stage]:.0%}")
    worst = {
        f"worst {stage}": f"{max(found, key=abs):+.1%} of {len(found)}, {sum(abs(e) <= BOUNDS[stage] for e in found)} within"
        for stage, found in errors.items()
        if found
    }
    return worst | {"breaches": breaches}


def suggest(measurements: Sequence[Measured], predictions: Predictions, rates: Sequence[str]) -> Efficiency:
    """Ridge regression of log errors on log rates, one Gauss-Newton step by finite differences."""
    fitted = [(m, p) for m in measurements if m.warm and (p := predictions.seconds(m))]
    start = GPUS["h200"].efficiency
    columns = []
    for rate in rates:
        nudged = predictions.with_efficiency(replace(start, **{rate: getattr(start, rate) * (1 + NUDGE)}))
        moved = [nudged.seconds(m) or p for m, p in fitted]
        columns.append([math.log(new / p) / math.log(1 + NUDGE) for new, (_, p) in zip(moved, fitted, strict=True)])
    predictions.with_efficiency(start)
    slopes = torch.tensor(columns, dtype=torch.float64).t()
    wanted = torch.tensor([math.log(m.seconds / p) for m, p in fitted], dtype=torch.float64)
    ridge = STIFFNESS**2 * torch.eye(len(rates), dtype=torch.float64)
    change = torch.linalg.solve(slopes.t() @ slopes + ridge, slopes.t() @ wanted).exp()
    return replace(start, **{rate: getattr(start, rate) * float(c) for rate, c in zip(rates, change, strict=True)})


def files(patterns: Sequence[str]) -> list[Path]:
    found = (path for pattern in patterns for path in sorted(HERE.glob(pattern)) if "_offload" not in path.name)
    return [path for path in found if path.stat().st_size]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="to judge on (default: those of JUDGED)")
    parser.add_argument("--gpu", help="key of the card the files were measured on (default: as their names say)")
    parser.add_argument("--only", default="", help="only cases whose label matches this regular expression")
    parser.add_argument("--fit", action="store_true", help="suggest efficiencies")
    parser.add_argument("--rates", nargs="+", default=RATES, choices=RATES, metavar="RATE", help="fit only these")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a GPU here would bring its machine's speed into the predictions
    held_out = args.files or files(JUDGED)
    assert args.files or not {*held_out} & {*files(FITTED)}, "what is fitted on is not judged on"
    measurements = [m for path in held_out for m in read(path, args.gpu) if re.search(args.only, m.label)]
    predictions = Predictions()
    if args.fit:
        start = GPUS["h200"].efficiency
        fitted = suggest([m for path in files(FITTED) for m in read(path)], predictions, args.rates)
        print("suggested efficiencies")
        for rate in args.rates:
            before, after = getattr(start, rate), getattr(fitted, rate)
            print(f"  {rate:18s} {before:10.4g} -> {after:10.4g}   {after / before - 1:+.1%}")
        predictions = predictions.with_efficiency(fitted)
        print("\nwith them, on files that they were not fitted on:")
    show(measurements, predictions)
    print()
    return conclude(judged(measurements, predictions))


if __name__ == "__main__":
    sys.exit(main())

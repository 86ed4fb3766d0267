"""Predicted against measured seconds of steps and stages, and the efficiencies that would bring them together.

    python benchmarks/calibrate_clock.py                        what is in benchmarks/*.json
    python benchmarks/calibrate_clock.py FILE...                these instead: fit_card, predict_vs_measure or beside_diffusers
                                                                JSONs, or record.json of a run on a GPU
    python benchmarks/calibrate_clock.py --fit FILE...          also suggests efficiencies (simulates each case once per rate: minutes)

Times marked * include what happens once in a process (loading libraries, compiling, tuning) or is not on the clock (encoding
the video): they are shown, not fitted. Steps are means without the first. The fit minimises relative errors with every rate
held near its present value (one weight of `STIFFNESS` against one measurement), so a rate that no measurement asks about stays.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from predict_vs_measure import BUILT_IN

from wanvram.config import RunConfig
from wanvram.predict.simulate import simulate
from wanvram.simulate.gpus import GPUS, Efficiency

HERE = Path(__file__).parent
SIZES = {"1.3B": "832*480", "14B": "1280*720"}  # of beside_diffusers.py: 81 frames, bf16 resident, VAE in float32
RATES = tuple(f.name for f in fields(Efficiency))
STEP = "step"  # in place of a stage's name: a steady denoising step
STIFFNESS = 0.2
NUDGE = 0.05


@dataclass(frozen=True)
class Measured:
    """Seconds of a stage or a steady step. warm: nothing in it happened for the first time."""

    label: str
    config: dict[str, Any]
    stage: str
    seconds: float
    warm: bool


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The resident run that fit_card.py makes after the capped one."""
    model = config["model_config"] | {"load_strategy": "full"}
    return config | {"model_config": model, "optimization": {"expandable_segments": True}}


def of_fit_card(document: dict[str, Any]) -> Iterator[Measured]:
    for case in document["cases"]:
        label, config = case["name"], case["config"]
        if case["step_seconds"]:
            yield Measured(label, config, STEP, case["step_seconds"], True)
        for row in case["stages"]:
            yield Measured(label, config, row["stage"], row["seconds"], False)
        if case["resident_step_seconds"]:
            resident = plain(config)
            yield Measured(label + " resident", resident, STEP, case["resident_step_seconds"], True)
            for stage, seconds in case["resident_stages"].items():
                yield Measured(label + " resident", resident, stage, seconds, stage == "decode")


def of_predict_vs_measure(document: list[dict[str, Any]]) -> Iterator[Measured]:
    configs = {case["name"]: case for case in BUILT_IN}
    for run in document:
        for stage, seconds in run.get("seconds", {}).items():
            if run["config"] in configs:
                yield Measured(run["config"], configs[run["config"]], stage, seconds, False)


def of_beside_diffusers(name: str, document: dict[str, Any]) -> Iterator[Measured]:
    model = next(model for model in SIZES if model in name)
    request = {"task": f"t2v-{model}", "size": SIZES[model], "sample_steps": 3, "weights": "random"}
    config = {"name": "beside", "model_config": {"precision": "bf16", "offload": True}, "request": request}
    yield Measured(name, config, STEP, document["our_dit"]["seconds"], True)
    yield Measured(name, config, "decode", document["our_vae"]["seconds"], True)


def of_record(name: str, document: dict[str, Any]) -> Iterator[Measured]:
    if document["simulated"]:
        raise SystemExit(f"{name} is a prediction; calibration needs a run on a GPU")
    step = steady_step(document)
    if step is not None:
        yield Measured(name, document["config"], STEP, step, True)
    for stage in document["stages"]:
        yield Measured(name, document["config"], stage["name"], stage["seconds"], False)


def read(path: Path) -> list[Measured]:
    document = json.loads(path.read_text())
    if isinstance(document, list):
        found = of_predict_vs_measure(document)
    elif "cases" in document:
        found = of_fit_card(document)
    elif "our_dit" in document:
        found = of_beside_diffusers(path.stem, document)
    elif "stages" in document:
        found = of_record(str(path), document)
    else:
        raise SystemExit(f"{path}: neither a record nor a benchmark with seconds")
    return [m for m in found if m.seconds]


def steady_step(record: dict[str, Any]) -> float | None:
    """Mean seconds of a denoising step without the first (unless it is alone)."""
    steps = next((s["children"] for s in record["stages"] if s["name"] == "denoise"), [])
    timed = [(s["seconds"], s["repeats"]) for s in steps if s["kind"] == "step" and s["seconds"] is not None]
    timed = timed[1:] or timed
    return sum(s * n for s, n in timed) / sum(n for _, n in timed) if timed else None


class Predictions:
    """Predicted seconds by configuration, each simulated once for the card's present efficiency."""

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu
        self._known: dict[str, dict[str, float | None]] = {}

    def seconds(self, measured: Measured) -> float | None:
        key = json.dumps(measured.config, sort_keys=True)
        if key not in self._known:
            config = RunConfig.from_dict(json.loads(key))
            record = simulate(replace(config, device="simulated", gpu=self.gpu, memory_limit_bytes=None))[0].to_json()
            stages = {s["name"]: s["seconds"] for s in record["stages"]}
            self._known[key] = stages | {STEP: steady_step(record)}
        return self._known[key].get(measured.stage)

    def with_efficiency(self, efficiency: Efficiency) -> Predictions:
        """A fresh set, for another efficiency of the card."""
        GPUS[self.gpu] = replace(GPUS[self.gpu], efficiency=efficiency)
        return Predictions(self.gpu)


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
    errors = [p / m.seconds - 1 for m in measurements if m.warm and (p := predictions.seconds(m)) is not None]
    if errors:
        print(f"\n{len(errors)} warm times: worst error {max(errors, key=abs):+.1%}")


def suggest(measurements: Sequence[Measured], predictions: Predictions, rates: Sequence[str]) -> Efficiency:
    """Ridge regression of log errors on log rates, one Gauss-Newton step by finite differences."""
    fitted = [(m, p) for m in measurements if m.warm and (p := predictions.seconds(m))]
    start = GPUS[predictions.gpu].efficiency
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


def default_files() -> list[Path]:
    patterns = ("*_beside_diffusers_*.json", "*_fit_card.json", "*_predict_vs_measure.json")
    return [path for pattern in patterns for path in sorted(HERE.glob(pattern))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--gpu", default="h200", help="key of the card the files were measured on")
    parser.add_argument("--only", default="", help="only cases whose label matches this regular expression")
    parser.add_argument("--fit", action="store_true", help="suggest efficiencies")
    parser.add_argument("--rates", nargs="+", default=RATES, choices=RATES, metavar="RATE", help="fit only these")
    args = parser.parse_args()
    measurements = [m for path in args.files or default_files() for m in read(path) if re.search(args.only, m.label)]
    predictions = Predictions(args.gpu)
    show(measurements, predictions)
    if not args.fit:
        return
    start = GPUS[args.gpu].efficiency
    fitted = suggest(measurements, predictions, args.rates)
    print("\nsuggested efficiencies")
    for rate in args.rates:
        before, after = getattr(start, rate), getattr(fitted, rate)
        print(f"  {rate:18s} {before:10.4g} -> {after:10.4g}   {after / before - 1:+.1%}")
    print("\nwith them:")
    show([m for m in measurements if m.warm], predictions.with_efficiency(fitted))


if __name__ == "__main__":
    main()

"""The residual stream in pinned RAM: the same velocities bit for bit, what whole runs then take of a card, and what it costs in time.

    python benchmarks/residual_stream.py predict --out benchmarks/2026-11-29_h200_residual_predicted.json      no GPU, 3 minutes
    python benchmarks/residual_stream.py equal --tasks t2v-1.3B,t2v-14B,i2v-14B --out a.json                  on the GPU, 2 minutes
    python benchmarks/residual_stream.py run --predicted FILE --only 14B-720P --steps 2 --out a.json          one case, both ways
    python benchmarks/residual_stream.py judge a.json                                                         exit code 1: a bound is missed

`equal` denoises one step at full size from random weights, blocks streamed, and compares both passes' velocities with those of the
stream on the device. `run` types `wanvram generate` under a hard cap, in a fresh process each, with the stream in RAM and then on
the device; nvml_watch.py, another process, polls the GPU; both videos have to be the
same to the byte. With --out of an earlier call it goes on with that file. Step times are those of the last step: the first one
compiles. Bounds are the issue's: memory of the whole GPU, time beside the same run with the stream on the device, 95 % of all stage
peaks to the byte, steps within 7 % of their prediction.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predict_vs_measure import compared, result_of
from provenance import ResultFile, circumstances, conclude, environment_of_a_person, read_record

from wanvram.units import GIB, parse_memory

Row = dict[str, Any]
SCRIPTS = ("residual_stream.py", "predict_vs_measure.py", "nvml_watch.py", "provenance.py")
LEAST_EXACT = 0.95  # of allocated and reserved peaks of all stages
MOST_STEP_ERROR = 0.07
TIMEOUT = 420.0  # seconds of one command
STREAMS = ("pinned", "device")
COMMON = "--precision bf16 --load_strategy block --expandable_segments True --attention cudnn --base_seed 1"


@dataclass(frozen=True)
class Case:
    """A request with rows of which an H200's attention has whole waves. device: also run with the stream there, for the time."""

    name: str
    task: str
    size: str
    frames: int
    rows: int
    tile: int
    most: str  # memory of the whole GPU
    ratio: float | None = None  # of the steps

    def ways(self) -> tuple[str, ...]:
        return STREAMS if self.ratio is not None else STREAMS[:1]

    def words(self, stream: str, steps: int) -> list[str]:
        """Without the verb. The cap is the bound; with the stream on the device it would be too small."""
        words = f"--task {self.task} --size {self.size} --frame_num {self.frames} --rows_per_chunk {self.rows} "
        words += f"--vae_tile {self.tile} --sample_steps {steps} --residual_in {stream} {COMMON} --vram "
        return [*words.split(), self.most if stream == "pinned" else "8GiB", "--prompt", "a cat on a skateboard"]


CASES = (
    Case("14B-720P", "t2v-14B", "1280*720", 81, 3328, 40, "3.5GiB", 1.05),
    Case("14B-480P", "t2v-14B", "832*480", 81, 1664, 30, "2.4GiB", 1.1),
    Case("i2v-14B-720P", "i2v-14B", "1280*720", 81, 3328, 40, "3.7GiB"),
    Case("14B-720P-161", "t2v-14B", "1280*720", 161, 2048, 40, "5GiB"),
)


# --- judging -----------------------------------------------------------------------------------------------------------------


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was found, and every bound that was missed."""
    breaches, found = [], {}
    runs = {(row["case"], row["stream"]): row for row in rows if row["kind"] == "run"}
    for row in rows:
        if row["kind"] == "equal" and not row["equal"]:
            breaches.append(f"{row['task']}: velocities differ by {row['largest_difference']}")
        if row["kind"] == "run":
            breaches += [f"{row['case']} {row['stream']}: {text}" for text in _missed(row)]
    for case in CASES:
        pinned, device = (runs.get((case.name, stream)) for stream in STREAMS)
        if pinned is None or pinned["exit_code"] != 0:
            continue
        found[case.name] = {"gib": round(pinned["above_bytes"] / GIB, 3), "step": pinned["step"]["measured"]}
        if pinned["above_bytes"] > parse_memory(case.most):
            breaches.append(f"{case.name}: {pinned['above_bytes'] / GIB:.3f} GiB of the GPU, at most {case.most}")
        if case.ratio is not None and device is not None and device["exit_code"] == 0:
            ratio = pinned["step"]["measured"] / device["step"]["measured"]
            found[case.name]["ratio"] = round(ratio, 4)
            if not pinned.get("videos") or pinned["videos"] != device["videos"]:
                breaches.append(f"{case.name}: another video with the stream in RAM than with it on the device")
            if ratio > case.ratio:
                breaches.append(
                    f"{case.name}: {ratio:.3f} of the step with the stream on the device, at most {case.ratio}"
                )
    peaks = [stage[q] for row in runs.values() for stage in row["stages"] for q in ("allocated", "reserved")]
    exact = sum(peak["predicted"] == peak["measured"] for peak in peaks)
    if peaks and exact < LEAST_EXACT * len(peaks):
        breaches.append(f"{exact} of {len(peaks)} stage peaks to the byte")
    same = [row["task"] for row in rows if row["kind"] == "equal" and row["equal"]]
    return {"equal": same, "runs": found, "exact_peaks": [exact, len(peaks)], "breaches": breaches}


def _missed(row: Mapping[str, Any]) -> list[str]:
    if row["exit_code"] != 0:
        return [f"failed with exit code {row['exit_code']}: {row['stderr_tail'][-400:]}"]
    predicted, measured = row["step"]["predicted"], row["step"]["measured"]
    if predicted is None or abs(predicted / measured - 1) <= MOST_STEP_ERROR:
        return []
    return [f"a step of {predicted:.3f} s predicted, {measured:.3f} s measured"]


# --- whole runs --------------------------------------------------------------------------------------------------------------


def predict(case: Case, stream: str, steps: int, gpu: str, scratch: Path) -> Row:
    """What `wanvram estimate` says of the command, which needs no GPU."""
    directory = scratch / f"{case.name}-{stream}"
    words = ["estimate", *case.words(stream, steps), "--gpu", gpu, "-o", str(directory), "--json"]
    ended = subprocess.run([sys.executable, "-m", "wanvram", *words], capture_output=True, text=True)
    record = read_record(directory)
    if ended.returncode != 0 or record is None:
        raise SystemExit(f"{case.name} {stream} could not be predicted: {ended.stderr[-1500:]}")
    stages = [{key: value for key, value in stage.items() if key != "children"} for stage in record["stages"]]
    dit = next(component for component in record["components"] if component["name"] == "dit")
    kept = {"peak": record["peak"], "host": record["host"], "times": record["times"], "dit": dit, "stages": stages}
    return {"command": shlex.join(["wanvram", *words]), "step": last_step(record), **kept}


def last_step(record: Mapping[str, Any]) -> float | None:
    (denoise,) = [stage for stage in record["stages"] if stage["part"] == "denoise"]
    seconds: float | None = denoise["children"][-1]["seconds"]
    return seconds


def run_once(case: Case, stream: str, args: argparse.Namespace, predicted: Mapping[str, Any], scratch: Path) -> Row:
    """Types the command under the watcher and puts what its record says beside the prediction."""
    directory, report = scratch / f"{case.name}-{stream}", scratch / "watch.json"
    report.unlink(missing_ok=True)
    words = [
        "generate",
        *case.words(stream, args.steps),
        "--weights",
        "random",
        "--device",
        "cuda",
        "-o",
        str(directory),
    ]
    words += ["--image", str(_picture(scratch))] if case.task.startswith("i2v") else []
    watcher = [sys.executable, str(Path(__file__).with_name("nvml_watch.py")), "--out", str(report)]
    command = [*watcher, "--timeout", str(TIMEOUT), "--", sys.executable, "-m", "wanvram", *words]
    start = time.monotonic()
    ended = subprocess.run(command, env=environment_of_a_person(), capture_output=True, text=True)
    watch: Row = json.loads(report.read_text()) if report.exists() else {"above_bytes": 0, "stderr_tail": ended.stderr}
    row: Row = {"kind": "run", "case": case.name, "stream": stream, "command": shlex.join(["wanvram", *words])}
    row |= {"exit_code": ended.returncode, "seconds": time.monotonic() - start, "above_bytes": watch["above_bytes"]}
    row |= {"predicted_bytes": predicted["peak"]["device_bytes"], "stages": [], "step": {}, "watch": watch}
    row["stderr_tail"] = watch["stderr_tail"][-2000:] if ended.returncode else ""
    record = read_record(directory)
    if record is None or ended.returncode:
        return row
    row["step"] = {"predicted": predicted["step"], "measured": last_step(record)}
    row["videos"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("*.mp4"))]
    row |= {"dit": next(c for c in record["components"] if c["name"] == "dit"), "host": record["host"]}
    return row | {"stages": compared(result_of(record), dict(predicted))["rows"]}


def _picture(scratch: Path) -> Path:
    from PIL import Image

    path = scratch / "picture.png"
    Image.effect_noise((1280, 720), 60).convert("RGB").save(path)
    return path


def show(row: Mapping[str, Any]) -> None:
    if row["kind"] == "equal":
        print(f"{row['task']} equal: {row['equal']}, {row['seconds']:.1f} s", flush=True)
        return
    step = ", ".join(f"{kind} {value:.3f} s" for kind, value in row["step"].items() if value is not None)
    exact = sum(s[q]["predicted"] == s[q]["measured"] for s in row["stages"] for q in ("allocated", "reserved"))
    print(
        f"{row['case']} {row['stream']}: exit {row['exit_code']}, {row['seconds']:.0f} s; NVML {row['above_bytes'] / GIB:.3f} GiB, "
        f"predicted {row['predicted_bytes'] / GIB:.3f}; step {step}; {exact} of {2 * len(row['stages'])} peaks to the byte",
        flush=True,
    )


# --- the same velocities -----------------------------------------------------------------------------------------------------


def equal(task: str, *, tiny: bool) -> Row:
    """Both passes of one step, with the stream in RAM and on the device; 81 frames of 832x480 in chunks that do not divide it."""
    import torch

    start = time.monotonic()
    pinned, device = (_velocity(task, stream, tiny=tiny) for stream in STREAMS)
    difference = (pinned - device).abs().max().item()
    finite = bool(torch.isfinite(pinned).all()) and bool(pinned.abs().max() > 0)
    same = torch.equal(pinned, device) and finite
    row = {"kind": "equal", "task": task, "equal": same, "largest_difference": difference, "finite": finite}
    return row | {"seconds": time.monotonic() - start}


def _velocity(task: str, stream: str, *, tiny: bool) -> Any:
    import torch

    from wanvram.config import Request, RunConfig, Strategy
    from wanvram.engine.components import Parts
    from wanvram.engine.denoising import velocities_of
    from wanvram.recorder.recorder import Recorder
    from wanvram.run.execute import assembled, make_device

    size = {"size": "64*96", "frame_num": 5} if tiny else {"size": "832*480", "frame_num": 81}
    request = Request.for_task(task, prompt="x", base_seed=1, sample_steps=2, **size)
    how = Strategy(load_strategy="block", offload=True, rows_per_chunk=7 if tiny else 5000, residual_in=stream)
    where = "cpu" if tiny else "cuda"
    config = RunConfig("equal", "", where, request, how, weights="tiny" if tiny else "random")
    device = make_device(config)
    pipeline = assembled(device, config, Recorder(device.meter, None, None)).pipeline
    parts = Parts(config, device, pipeline.weights)
    generator = torch.Generator(device.torch_device).manual_seed(5)
    with device.session():
        width = parts.specs.text_encoder.dim
        contexts = [torch.randn(n, width, device=device.torch_device, generator=generator) for n in (40, 20)]
        extra = pipeline.stand_in_pictures(parts)
        for tensor in extra.values():
            tensor.normal_(generator=generator)
        plan = pipeline.prepare(parts, [context.to(torch.bfloat16) for context in contexts], extra)
        component = pipeline._loaded[plan.turn.model].component
        noise = torch.randn(pipeline.inputs.noise_shape, device=device.torch_device, generator=generator)
        with velocities_of(config, device, pipeline.inputs, component, plan.negative) as velocities:
            (found,) = velocities([noise], plan.times[0], plan.conditions)
        result = found.cpu()
        component.release()
        device.empty_cache()
    return result


# --- the command -------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    one, two, three, four = (verbs.add_parser(verb) for verb in ("predict", "equal", "run", "judge"))
    for verb in (one, two, three):
        verb.add_argument("--out", type=Path, required=True, help="the result file")
    for verb in (one, three):
        verb.add_argument("--only", default=",".join(case.name for case in CASES), help="cases, separated by commas")
        verb.add_argument("--steps", type=int, default=2)
    one.add_argument("--gpu", default="h200", help="the card to predict for")
    two.add_argument("--tasks", default="t2v-1.3B,t2v-14B,i2v-14B")
    two.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    three.add_argument("--predicted", type=Path, required=True, help="what `predict` wrote")
    four.add_argument("file", type=Path)
    return made


def main() -> int:
    args = parser().parse_args()
    if args.verb == "judge":
        return conclude(judge(json.loads(args.file.read_text())["rows"]))
    made = json.loads(args.out.read_text())["rows"] if args.out.exists() and args.verb != "predict" else []
    results = ResultFile(args.out, circumstances(*SCRIPTS), judge, made)
    cases = [case for case in CASES if args.verb != "equal" and case.name in args.only.split(",")]
    with tempfile.TemporaryDirectory() as name:
        if args.verb == "predict":
            with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
                asked = {
                    f"{case.name} {way}": pool.submit(predict, case, way, args.steps, args.gpu, Path(name))
                    for case in cases
                    for way in case.ways()
                }
                results.header["predicted"] = {key: found.result() for key, found in asked.items()}
            results.write()
            return 0
        for task in args.tasks.split(",") if args.verb == "equal" else ():
            results.append(equal(task, tiny=args.tiny))
            show(results.rows[-1])
        for case in cases:
            predicted = json.loads(args.predicted.read_text())["predicted"]
            for way in case.ways():
                results.append(run_once(case, way, args, predicted[f"{case.name} {way}"], Path(name)))
                show(results.rows[-1])
    return conclude(judge(results.rows))


if __name__ == "__main__":
    sys.exit(main())

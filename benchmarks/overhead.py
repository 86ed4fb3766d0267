"""Does recording change what it measures? Step time and peak memory with and without it, in pairs in one process.

    python benchmarks/overhead.py                         on the GPU: t2v-1.3B 832x480, 81 frames, 6 steps; 2 minutes
    python benchmarks/overhead.py --tiny --device cpu     tries the script anywhere; seconds

Each run loads the transformer with random weights, prepares and denoises, resident in bf16, in one of three ways:
`on` is profile_memory with log_interval 1 (every block of every step) and an event log in a run directory; `off` is
profile_memory: false without a directory, where stages and steps are still recorded; `bare` records nothing at all.
A round runs all three, the next one in the opposite order (ABBA); the first round warms up and is not counted. Trace and
snapshot are off. Steps are timed by this script, the same for all (CUDA events), without the first; a round gives one ratio of
medians, the verdict is the median over rounds. Peaks are what the recorder reports; for `bare` the allocator's own counters,
never reset during the run. Exit code 1 beyond the bounds of the project: step time below 1 %, peaks equal to the byte.
Writes <out>/<date>_<gpu>_overhead.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from own_parts import Unrecorded
from provenance import conclude, header, unused

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.devices import Device
from wanvram.engine.pipeline import Pipeline
from wanvram.engine.stage_progress import Done
from wanvram.media.inputs import prepare_inputs
from wanvram.recorder.events import EventLog
from wanvram.recorder.recorder import Recorder
from wanvram.run.execute import make_device
from wanvram.run.weights import GeneratedWeights

WAYS = ("on", "off", "bare")
BOUND = 0.01
PROMPT_TOKENS = 512
MIB = 2**20


class StepClock:
    """A mark after every step: CUDA events, which cost the same with and without recording, or the clock on the CPU."""

    def __init__(self, device: Device) -> None:
        self.cuda = device.kind == "cuda"
        self.marks: list[Any] = []

    def __call__(self, _done: Done) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every step but the first."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]


def config_of(args: argparse.Namespace) -> RunConfig:
    size, frames = ("192*96", 5) if args.tiny else ("832*480", 81)
    request = Request.for_task("t2v-1.3B", size=size, frame_num=frames, sample_steps=args.steps, base_seed=1)
    weights = "tiny" if args.tiny else "random"
    return RunConfig("overhead", "overhead", args.device, request, Strategy(offload=True), weights=weights)


def one_run(way: str, config: RunConfig, device: Device, directory: Path) -> dict[str, Any]:
    """Loads the transformer, denoises, releases it. Weights, text and noise are the same in every run."""
    config = replace(config, measurement=Measurement(profile_memory=way == "on", log_interval=1))
    gc.collect()
    device.empty_cache()
    log = directory / "memory_events.json"
    clock = StepClock(device)
    with EventLog(log) if way == "on" else nullcontext() as events, device.session():
        device.meter.reset_peak()
        recorder = (Unrecorded if way == "bare" else Recorder)(device.meter, events, None)
        weights = GeneratedWeights(1, tiny=config.weights == "tiny")
        inputs, _ = prepare_inputs(config.request, simulated=False, real_weights=False)
        pipeline = Pipeline(config, device, recorder, weights, inputs, tell=clock, prompts=["a prompt"])
        denoise(pipeline, Parts(config, device, weights))
        peaks = [span.peak for span in recorder.spans] + [device.meter.peak()]
        return {
            "way": way,
            "step_seconds": clock.seconds(),
            "peak_allocated_bytes": max(peak.allocated_bytes for peak in peaks),
            "peak_reserved_bytes": max(peak.reserved_bytes for peak in peaks),
            "spans": sum(1 for stage in recorder.spans for _ in stage.walk()),
            "events": len(json.loads(log.read_text())) if way == "on" else 0,
        }


def denoise(pipeline: Pipeline, parts: Parts) -> None:
    """What Pipeline.run does with the transformer, with random contexts in place of encoded text."""
    device = pipeline.device
    shape, generator = (PROMPT_TOKENS, parts.specs.text_encoder.dim), device.generator(1)
    contexts = [
        torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device.torch_device) for _ in range(2)
    ]
    plan = pipeline.prepare(parts, contexts, pipeline.stand_in_pictures(parts))
    pipeline.denoise_all(parts, plan)


def rounds_of(config: RunConfig, device: Device, count: int) -> list[list[dict[str, Any]]]:
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(count):
            order = WAYS if number % 2 == 0 else WAYS[::-1]
            rounds.append([one_run(way, config, device, Path(scratch)) for way in order])
            cells = [f"{run['way']} {median(run['step_seconds']):.4f} s" for run in rounds[-1]]
            print(f"round {number}{' (warm-up)' if number == 0 else ''}: {', '.join(cells)}", flush=True)
    return rounds


def verdict(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """`on` against `off` and against `bare`: step time round by round, peaks over all counted rounds."""
    by_way = [{run["way"]: run for run in runs} for runs in rounds[1:]]
    result: dict[str, Any] = {}
    for other in WAYS[1:]:
        steps = [median(r["on"]["step_seconds"]) / median(r[other]["step_seconds"]) - 1 for r in by_way]
        result[f"on_against_{other}"] = {
            "step_time": median(steps),
            "step_time_by_round": steps,
            "step_time_kept": abs(median(steps)) < BOUND,
            "peaks_kept": all(
                len({r[way][peak] for r in by_way for way in ("on", other)}) == 1
                for peak in ("peak_allocated_bytes", "peak_reserved_bytes")
            ),
        }
    return result


def show(rounds: list[list[dict[str, Any]]], result: dict[str, Any]) -> None:
    for way in WAYS:
        runs = [run for runs in rounds[1:] for run in runs if run["way"] == way]
        step = median(second for run in runs for second in run["step_seconds"])
        peaks = [
            f"{figure} {' or '.join(f'{b / MIB:.3f}' for b in sorted({r[f'peak_{figure}_bytes'] for r in runs}))} MiB"
            for figure in ("allocated", "reserved")
        ]
        counts = f"{runs[0]['spans']} spans, {runs[0]['events']} events"
        print(f"{way:4s}: median step {step:.4f} s, {', '.join(peaks)}; {counts}")
    for name, r in result.items():
        low, high = min(r["step_time_by_round"]), max(r["step_time_by_round"])
        print(
            f"{name.replace('_', ' ')}: step time {r['step_time']:+.3%} (rounds {low:+.3%} to {high:+.3%}, bound "
            f"{BOUND:.0%}) {'kept' if r['step_time_kept'] else 'BROKEN'}; peaks {'equal' if r['peaks_kept'] else 'DIFFER'}"
        )


def breaches_of(result: dict[str, Any]) -> list[str]:
    found = []
    for name, r in result.items():
        if not r["step_time_kept"]:
            found.append(f"{name}: a step takes {r['step_time']:+.2%}, at most {BOUND:.0%}")
        if not r["peaks_kept"]:
            found.append(f"{name}: the peaks differ")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny weights and 5 small frames: tries the script")
    parser.add_argument("--rounds", type=int, default=5, help="with the one that warms up; at least 4")
    parser.add_argument("--steps", type=int, default=6, help="of a run; at least 3")
    parser.add_argument("--gpu", help="names the file (default: cpu, or h200 and the like from the device's name)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    if args.rounds < 4 or args.steps < 3:
        parser.error("at least 4 rounds of at least 3 steps: the first of each is not counted")
    config = config_of(args)
    device = make_device(config)
    rounds = rounds_of(config, device, args.rounds)
    result = verdict(rounds)
    show(rounds, result)
    key = args.gpu or ("cpu" if args.device == "cpu" else device.name.removeprefix("cuda:NVIDIA ").split()[0].lower())
    document = {
        **header("overhead.py", "own_parts.py"),
        "device": device.name,
        "config": config.to_dict(),
        "verdict": result,
        "rounds": rounds,
    }
    target = unused(args.out / f"{datetime.date.today()}_{key}_overhead.json")
    target.write_text(json.dumps(document, indent=1) + "\n")
    return conclude({"rounds": len(rounds), "breaches": breaches_of(result)})


if __name__ == "__main__":
    sys.exit(main())

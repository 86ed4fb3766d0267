"""Videos made together: the same latents as one after the other, memory as predicted, and what it saves in time.

    python benchmarks/batches.py --out benchmarks/2026-11-29_h200_batches.json          3 to 4 minutes of an H200
    python benchmarks/batches.py --only equal,guidance --out some.json
    python benchmarks/batches.py --tiny --out some.json        no GPU: the same commands with tiny models; only latents are judged

Every run is `wanvram generate` in a fresh process, with random weights unless --checkpoint names some; `wanvram estimate` has predicted it
before, and that is in the file before the first run. Cases:

    equal      1.3B 832x480, 17 frames: two prompts, and two seeds of one, apart and together
    pictures   t2i-14B 1280x720, blocks streamed from pinned RAM: a picture alone, and 4 that share every pass over the weights
    videos     two 1.3B 832x480 videos of 81 frames, one after the other and together
    guidance   a 1.3B video with scale 1 beside the first of those videos, whose scale is 5

Random weights follow the seed of the command, so the second of two seeds is compared among batches only. Latents are hashed as the
VAE gets them. Exit code 1 if latents differ, a stage's peak or a ratio of step times misses its prediction, or a command fails.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

from predict_vs_measure import BOUNDS, compared, result_of
from provenance import ResultFile, circumstances, conclude, environment_of_a_person

from wanvram.record import RunRecord

Row = dict[str, Any]

MOST_ERROR = 0.15  # of a ratio of two step times, predicted against measured
MOST_GUIDANCE_ERROR = 0.03  # of the ratio of one pass to two, which is 0.5 but for what a step does beside its forwards
PROMPTS = ("a cat on a skateboard", "two dogs on a boat", "rain on a window", "a train in the mountains")
SMALL = "--task t2v-1.3B --size 832*480 --precision bf16"
PICTURES = "--task t2i-14B --size 1280*720 --precision bf16 --load_strategy block --sample_steps 4"
TINY = "--weights tiny --device cpu --task t2v-1.3B --size 64*64 --frame_num 5 --sample_steps 2"


@dataclass(frozen=True)
class Case:
    """One command. prompts: of a file, if several. beside: the case whose step time it is compared with."""

    group: str
    name: str
    flags: str
    prompts: int = 1
    beside: str = ""


CASES = (
    Case("equal", "apart", f"{SMALL} --frame_num 17 --sample_steps 4 --load_strategy block", 2),
    Case("equal", "together", f"{SMALL} --frame_num 17 --sample_steps 4 --load_strategy block --batch_size 2", 2),
    Case(
        "equal",
        "shared",
        f"{SMALL} --frame_num 17 --sample_steps 4 --load_strategy block --batch_size 2 --micro_batch_size 2",
        2,
    ),
    Case("equal", "seeds", f"{SMALL} --frame_num 17 --sample_steps 4 --load_strategy block --batch_size 2"),
    Case(
        "equal",
        "seeds-shared",
        f"{SMALL} --frame_num 17 --sample_steps 4 --load_strategy full --batch_size 2 --micro_batch_size 2",
    ),
    Case("pictures", "one-picture", PICTURES),
    Case("pictures", "four-pictures", f"{PICTURES} --batch_size 4 --micro_batch_size 4", 4, beside="one-picture"),
    Case("videos", "one-after-the-other", f"{SMALL} --frame_num 81 --sample_steps 4", 2),
    Case(
        "videos",
        "both",
        f"{SMALL} --frame_num 81 --sample_steps 4 --batch_size 2 --micro_batch_size 2",
        2,
        beside="one-after-the-other",
    ),
    Case(
        "guidance",
        "scale-1",
        f"{SMALL} --frame_num 81 --sample_steps 4 --sample_guide_scale 1",
        beside="one-after-the-other",
    ),
)
# Pairs of cases that make some of the same videos.
SAME = (
    ("apart", "together"),
    ("apart", "shared"),
    ("seeds", "apart"),
    ("seeds", "seeds-shared"),
    ("one-picture", "four-pictures"),
    ("one-after-the-other", "both"),
)


# --- judging -----------------------------------------------------------------------------------------------------------------


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every bound that was missed, and the ratios that were found; fine if `breaches` is empty."""
    by_name = {row["name"]: row for row in rows}
    breaches = [f"{row['name']}: {text}" for row in rows for text in _judge_run(row)]
    compared_latents = 0
    for one, other in SAME:
        if one in by_name and other in by_name:
            found, beside = by_name[one]["latents"], by_name[other]["latents"]
            shared = found.keys() & beside.keys()
            compared_latents += len(shared)
            if not shared or any(found[video] != beside[video] for video in shared):
                breaches.append(f"the latents of {one} and {other} differ")
    ratios = {row["name"]: _ratio(row, by_name[row["beside"]]) for row in rows if row["beside"] in by_name}
    breaches += [f"{name}: {text}" for name, ratio in ratios.items() for text in _judge_ratio(ratio, by_name[name])]
    return {"runs": len(rows), "latents_compared": compared_latents, "step_ratios": ratios, "breaches": breaches}


def _judge_run(row: Mapping[str, Any]) -> list[str]:
    if row["exit_code"] != 0:
        return [f"failed with exit code {row['exit_code']}: {row['stderr_tail'][-300:]}"]
    return [
        f"{stage['stage']}: {quantity} {stage[quantity]['error']:+.3%} off"
        for stage in row["stages"]
        for quantity, bound in BOUNDS.items()
        if abs(stage[quantity]["error"]) > bound
    ]


def _ratio(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float | None]:
    """Step time a video, of the one as a share of the other's."""
    found: dict[str, float | None] = {}
    for kind in ("predicted", "measured"):
        pair = [r["steps"].get(kind) for r in (row, other)]
        found[kind] = None if None in pair else pair[0] / row["together"] / (pair[1] / other["together"])
    return found


def _judge_ratio(ratio: Mapping[str, float | None], row: Mapping[str, Any]) -> list[str]:
    predicted, measured = ratio["predicted"], ratio["measured"]
    if predicted is None or measured is None:
        return []  # tiny models: nothing is predicted
    guidance = row["group"] == "guidance"
    bound = MOST_GUIDANCE_ERROR if guidance else MOST_ERROR
    misses = [] if abs(predicted / measured - 1) <= bound else [f"{predicted:.3f} predicted, {measured:.3f} measured"]
    return misses + (["one pass takes no half of two"] if guidance and abs(2 * measured - 1) > bound else [])


# --- running -----------------------------------------------------------------------------------------------------------------


def words_of(case: Case, scratch: Path, *, tiny: bool) -> list[str]:
    """What is asked for, without the verb. tiny: of the flags only those of the batch."""
    words = case.flags.split()
    if tiny:
        kept = ("--batch_size", "--micro_batch_size", "--sample_guide_scale", "--load_strategy")
        words = [
            *TINY.split(),
            *(w for flag, v in pairwise(words) if flag in kept for w in (flag, v)),
        ]
    prompts = ["--prompt", PROMPTS[0]]
    if case.prompts > 1:
        file = scratch / f"{case.prompts}-prompts.txt"
        file.write_text("\n".join(PROMPTS[: case.prompts]) + "\n")
        prompts = ["--prompt_file", str(file)]
    return [*words, *prompts, "--base_seed", "1"]


def predict(case: Case, scratch: Path, gpu: str) -> dict[str, Any]:
    """The record of `wanvram estimate`, which needs no GPU."""
    directory = scratch / "predicted" / case.name
    words = ["estimate", *words_of(case, scratch, tiny=False), "--gpu", gpu, "-o", str(directory), "--json"]
    ended = subprocess.run([sys.executable, "-m", "wanvram", *words], capture_output=True, text=True)
    if ended.returncode != 0:
        raise SystemExit(f"{case.name} could not be predicted: {ended.stderr[-1500:]}")
    return RunRecord.read(directory / "record.json").to_json()


def run_once(case: Case, scratch: Path, weights: str, predicted: dict[str, Any] | None) -> Row:
    """Types the command and stops the time."""
    directory, hashes = scratch / "measured" / case.name, scratch / f"{case.name}.json"
    words = ["generate", *words_of(case, scratch, tiny=predicted is None), "-o", str(directory)]
    words += [] if predicted is None else ["--ckpt_dir", weights, "--device", "cuda"]
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, __file__, "--typed", str(hashes), "--", *words],
        env=environment_of_a_person(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    row: Row = {
        "group": case.group,
        "name": case.name,
        "beside": case.beside,
        "command": shlex.join(["wanvram", *words]),
        "exit_code": ended.returncode,
        "seconds": time.monotonic() - start,
        "latents": _by_video(case, json.loads(hashes.read_text())) if hashes.exists() else {},
        "stages": [],
        "steps": {},
        "together": 1,
        "stderr_tail": ended.stderr[-2000:] if ended.returncode else "",
    }
    return row if ended.returncode else row | _figures(RunRecord.read(directory / "record.json"), predicted)


def _by_video(case: Case, hashes: Sequence[str]) -> dict[str, str]:
    """By prompt and seed, which say with the size and the steps of a group what video it is."""
    several = case.prompts > 1
    return {f"prompt {n if several else 0}, seed {1 if several else n + 1}": found for n, found in enumerate(hashes)}


def _figures(record: RunRecord, predicted: dict[str, Any] | None) -> Row:
    steps = {"measured": record.step_seconds()}
    figures: Row = {"together": record.together, "steps": steps, "videos": record.to_json()["videos"]}
    if predicted is None:
        return figures
    steps["predicted"] = RunRecord.from_json(predicted).step_seconds()
    return figures | {"stages": compared(result_of(record.to_json()), predicted)["rows"]}


def typed(hashes: Path, words: Sequence[str]) -> int:
    """The command itself, in this process, with the hash of every latent that the VAE gets written to a file."""
    from wanvram.cli.main import main as command
    from wanvram.engine.pipeline import Pipeline

    found: list[str] = []
    decode = Pipeline._decode

    def hashed(self: Any, component: Any, latent: Any, sink: Any, stage: str) -> None:
        found.append(hashlib.sha256(latent.cpu().numpy().tobytes()).hexdigest())
        decode(self, component, latent, sink, stage)

    Pipeline._decode = hashed  # type: ignore[method-assign]
    code = command(list(words))
    hashes.write_text(json.dumps(found))
    return code


def show(row: Mapping[str, Any]) -> None:
    equal = sum(
        stage[q]["predicted"] == stage[q]["measured"] for stage in row["stages"] for q in ("allocated", "reserved")
    )
    steps = ", ".join(f"{kind} {value:.3f} s" for kind, value in row["steps"].items() if value is not None)
    print(
        f"{row['group']:9s} {row['name']:20s} exit {row['exit_code']}, {row['seconds']:.1f} s; step of {row['together']}: {steps}; "
        f"{equal} of {2 * len(row['stages'])} peaks to the byte",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--only", default="", help="groups, separated by commas")
    parser.add_argument("--gpu", default="h200", help="the card that is here, for the predictions")
    parser.add_argument("--checkpoint", default="random", help="weights of every case instead of random ones")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--typed", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.typed is not None:
        return typed(args.typed, args.words)
    if args.out is None:
        parser.error("--out is missing")
    wanted = args.only.split(",") if args.only else [case.group for case in CASES]
    needed = {case.beside for case in CASES if case.group in wanted}
    cases = [case for case in CASES if case.group in wanted or case.name in needed]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            made = {} if args.tiny else {c.name: pool.submit(predict, c, scratch, args.gpu) for c in cases}
            predicted = {name: record.result() for name, record in made.items()}
        header = circumstances("batches.py", "predict_vs_measure.py", "provenance.py") | {"predicted": predicted}
        results = ResultFile(args.out, header, judge)
        for case in cases:
            results.append(run_once(case, scratch, args.checkpoint, predicted.get(case.name)))
            show(results.rows[-1])
    return conclude(judge(results.rows))


if __name__ == "__main__":
    sys.exit(main())

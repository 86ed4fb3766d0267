"""Several GPUs of one host: speed, memory by NVML, predictions rank by rank, promises, the same video, faults. Any number of GPUs.

    python benchmarks/several_gpus.py layouts --case 14B-720P --out several.jsonl      one GPU and every way of sharing; about 6 minutes
    python benchmarks/several_gpus.py promise --count 12 --out several.jsonl           random requests and budgets, kept on every GPU
    python benchmarks/several_gpus.py same --case 1.3B-480P --out several.jsonl        frames of every way against one GPU's
    python benchmarks/several_gpus.py faults --count 5 --out several.jsonl             each rank killed with -9 at random moments
    python benchmarks/several_gpus.py diffusers --case 14B-720P --out several.jsonl    diffusers' context parallel: Ulysses and ring
    python benchmarks/several_gpus.py predict --case 14B-720P --gpus 8 --card h100     the same table simulated; no GPU
    python benchmarks/several_gpus.py judge several.jsonl                              the bounds; exit code 1 if one is missed; no GPU
    python benchmarks/several_gpus.py judge benchmarks/2026-11-29_h200_several_gpus.json

Runs are `wanvram generate` with random weights, each in processes of its own; NVML is polled from here, all GPUs every 5 ms, and a
GPU's figure is its highest used memory less what was used before. One JSON line a figure, written at once. A part stops before
--minutes (8) are over and says what it left out. Predictions are made beside the runs, on the CPU, of the configuration that ran.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvml_watch import gpu_facts
from provenance import circumstances, environment_of_a_person, read_record

GIB, MIB = 2**30, 2**20
CASES = {
    "14B-720P": ("t2v-14B", "1280*720", 3),
    "14B-480P": ("t2v-14B", "832*480", 4),
    "1.3B-480P": ("t2v-1.3B", "832*480", 6),
}
STREAMED = ("--precision", "bf16", "--vae_tile", "40", "--expandable_segments", "True")
# Least speedups of two GPUs at 14B 720P, the most that a GPU may lose there with Ulysses, seconds in which everything has to end.
LEAST = {"cfg": 1.93, "ulysses": 1.88, "ring": 1.85}
MOST_BYTES, MOST_SECONDS = int(3.6 * GIB), 15.0
STEP_ERROR, DEVICE_ERROR, EQUAL_SHARE = 0.07, 0.01, 0.95
Row = dict[str, Any]


def ways(count: int) -> dict[str, list[str]]:
    """Ways in which `count` GPUs share a video, as flags."""
    rest = str(count // 2)
    found = {
        "one": [],
        "cfg": ["--cfg_size", "2", "--ulysses_size", rest],
        "ulysses": ["--ulysses_size", str(count)],
        "ring": ["--ring_size", str(count)],
        "ulysses, shards": ["--ulysses_size", str(count), "--dit_fsdp", "True"],
        "cfg, shards": ["--cfg_size", "2", "--ulysses_size", rest, "--dit_fsdp", "True"],
        "ulysses, shards on the device": [
            "--ulysses_size",
            str(count),
            "--dit_fsdp",
            "True",
            "--load_strategy",
            "full",
        ],
        "ulysses, resident": ["--ulysses_size", str(count), "--load_strategy", "full"],
    }
    if count >= 4:
        found["ulysses x ring"] = ["--ulysses_size", rest, "--ring_size", "2"]
    return found


# --- watching ----------------------------------------------------------------------------------------------------------------


class Watch:
    """The highest used memory of every GPU, polled by a thread."""

    def __init__(self, count: int) -> None:
        import pynvml

        self.nvml = pynvml
        pynvml.nvmlInit()
        self.handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        self.peak = self.now()
        self._over = threading.Event()

    def now(self) -> list[int]:
        return [int(self.nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self.handles]

    def settled(self, before: Sequence[int], seconds: float = 10.0) -> list[int]:
        """Used once it is as little as before, or when that has not come."""
        end = time.monotonic() + seconds
        used = self.now()
        while any(a > b + MIB for a, b in zip(used, before, strict=True)) and time.monotonic() < end:
            time.sleep(0.05)
            used = self.now()
        return used

    def __enter__(self) -> Watch:
        self.peak = self.before = self.now()
        self._over.clear()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._over.wait(0.005):
            self.peak = [max(pair) for pair in zip(self.peak, self.now(), strict=True)]

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def above(self) -> list[int]:
        return [peak - before for peak, before in zip(self.peak, self.before, strict=True)]


def run(command: Sequence[str], watch: Watch, timeout: float) -> Row:
    """Of `python -m wanvram COMMAND`, or of another file: how it ended, seconds, device bytes of every GPU."""
    start = time.monotonic()
    words = list(command) if command[0].endswith(".py") else ["-m", "wanvram", *command]
    with watch:
        try:
            ended = subprocess.run(
                [sys.executable, *words], env=environment_of_a_person(), capture_output=True, text=True, timeout=timeout
            )
            code, said, out = ended.returncode, ended.stderr[-600:], ended.stdout
        except subprocess.TimeoutExpired as error:
            code, said, out = -1, f"killed after {timeout} s: {error.stderr!r}"[-600:], ""
    seconds = time.monotonic() - start
    watch.settled(watch.before)
    return {
        "exit_code": code,
        "seconds": round(seconds, 2),
        "above_bytes": watch.above(),
        "stderr": said,
        "stdout": out,
    }


# --- figures -----------------------------------------------------------------------------------------------------------------


class Figures:
    """Lines of the result file; when a part has to stop."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end: float = time.monotonic() + 60 * args.minutes
        self.watch = Watch(args.gpus)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = gpu_facts(self.watch.nvml, self.watch.handles[0])
        self.add(
            {"figure": "circumstances", "part": args.part, "gpus": args.gpus, **facts}
            | circumstances("several_gpus.py")
        )

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, row: Row) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with self.args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def left_out(self, what: str) -> None:
        self.add({"figure": "left out", "what": what, "why": f"{self.args.minutes} minutes were over"})


def words_of(case: str, flags: Sequence[str]) -> list[str]:
    task, size, steps = CASES[case]
    words = [
        "generate",
        "--task",
        task,
        "--size",
        size,
        "--sample_steps",
        str(steps),
        "--base_seed",
        "1",
        "--prompt",
        "x",
    ]
    return [*words, "--weights", "random", *STREAMED, *flags]


def layouts(args: argparse.Namespace, folder: Path) -> None:
    figures, waiting = Figures(args), []
    alone: float | None = None
    with ThreadPoolExecutor(4) as pool:
        for name, flags in ways(args.gpus).items():
            if args.only and name not in args.only.split(";") and (name != "one" or args.skip_one):
                continue
            if figures.left() < 45:
                figures.left_out(name)
                continue
            directory = folder / name.replace(" ", "_").replace(",", "")
            words = [*words_of(args.case, flags), "-o", str(directory)]
            row = run(words, figures.watch, figures.left())
            del row["stdout"]
            record = read_record(directory)
            guess = pool.submit(_estimate, directory, args.card) if record else None
            step = None if record is None else _step(record)
            alone = step if name == "one" else alone
            row |= {"figure": "layout", "case": args.case, "way": name, "gpus": 1 if name == "one" else args.gpus}
            row |= {"step_seconds": step, "speedup": alone / step if alone and step else None}
            waiting.append((row, record, guess))
        for row, record, guess in waiting:
            figures.add(row | (_against(record, guess) if record and guess else {}))


def predict(args: argparse.Namespace, _: Path) -> None:
    """Denoising, every way simulated: device bytes of the GPU that needs most, host bytes of all, seconds of the slowest."""
    from wanvram.cli.flags import config_from_flags
    from wanvram.cli.main import build_parser
    from wanvram.cli.processes import for_all
    from wanvram.predict.stage import simulate_stage

    task, size, _steps = CASES[args.case]
    for name, flags in ways(args.gpus).items():
        if args.only and name not in args.only.split(";"):
            continue
        words = ["estimate", "--task", task, "--size", size, "--gpu", args.card, *STREAMED, *flags]
        asked = build_parser().parse_args([*words, *(["--link", args.link] if args.link else [])])
        limits = {"weights": "random", "gpu": args.card, "memory_limit_bytes": None}
        found = simulate_stage(for_all(config_from_flags(asked, device="simulated", **limits)), "dit")
        row = {"step_seconds": found.seconds_per_step, "host_bytes": found.host_bytes, "base_bytes": found.base_bytes}
        row |= {f"{kind}_bytes": getattr(found, f"peak_{kind}_bytes") for kind in ("allocated", "reserved", "device")}
        about = {
            "case": args.case,
            "card": args.card,
            "link": args.link,
            "gpus": 1 if name == "one" else args.gpus,
            "way": name,
        }
        print(json.dumps({"figure": "predicted", **about, **row}), flush=True)


def _step(record: Row) -> float | None:
    """The median step but the first, which loads kernels."""
    steps = [
        s
        for stage in record["stages"]
        if stage["part"] == "denoise"
        for s in stage["children"]
        for _ in range(s["repeats"])
    ]
    times = sorted(step["seconds"] for step in steps[1:])
    return times[len(times) // 2] if times else None


def _estimate(directory: Path, card: str) -> Row | None:
    command = ["-m", "wanvram", "estimate", "--config", str(directory / "config.yaml"), "--gpu", card, "--json"]
    ended = subprocess.run(
        [sys.executable, *command], env=environment_of_a_person(CUDA_VISIBLE_DEVICES=""), capture_output=True
    )
    with suppress(ValueError):
        return dict(json.loads(ended.stdout))
    return None


def _against(record: Row, guess: Future[Row | None]) -> Row:
    """Predicted against measured, stage by stage of every rank."""
    predicted = guess.result()
    if predicted is None:
        return {"prediction": "failed"}
    pairs = []
    for rank, stages in _by_rank(record).items():
        theirs = {stage["name"]: stage for stage in _by_rank(predicted).get(rank, [])}
        pairs += [(theirs[stage["name"]], stage) for stage in stages if stage["name"] in theirs]
    measured_step, step = _step(record), _step(predicted)
    return {
        "predicted_step_seconds": step,
        "step_error": step / measured_step - 1 if step and measured_step else None,
        "stages": len(pairs),
        "equal_allocated": sum(p["peak_allocated_bytes"] == m["peak_allocated_bytes"] for p, m in pairs),
        "equal_reserved": sum(p["peak_reserved_bytes"] == m["peak_reserved_bytes"] for p, m in pairs),
        "predicted_device_bytes": [
            max(s["peak_device_bytes"] for s in stages) for _, stages in sorted(_by_rank(predicted).items())
        ],
        "pinned_bytes": sum(
            max((s["pinned_bytes"] for s in stages), default=0) for stages in _by_rank(record).values()
        ),
    }


def _by_rank(record: Row) -> dict[int, list[Row]]:
    if not record.get("ranks"):
        return {0: record["stages"]}
    return {number: rank["stages"] for rank in record["ranks"] for number in rank["ranks"]}


def promise(args: argparse.Namespace, folder: Path) -> None:
    """Every GPU stays within the budget, or the command ends with 3 before it has used one."""
    figures = Figures(args)
    for index in range(args.first, args.first + args.count):
        if figures.left() < 40:
            figures.left_out(f"promises from {index}")
            return
        draw = random.Random(f"{args.seed} {index}")
        task = draw.choice(("t2v-1.3B", "t2v-1.3B", "t2v-14B"))
        size = draw.choice(("832*480", "480*832"))
        frames = 4 * draw.randint(1, 20 if task == "t2v-1.3B" else 8) + 1
        budget = round(2.2 * (40 / 2.2) ** draw.random(), 2)
        words = ["generate", "--gpus", str(args.gpus), "--task", task, "--size", size, "--frame_num", str(frames)]
        words += [
            "--sample_steps",
            "2",
            "--base_seed",
            "1",
            "--prompt",
            "x",
            "--weights",
            "random",
            "--precision",
            "bf16",
        ]
        words += ["--vram_budget", f"{budget}GiB", "-o", str(folder / f"promise{index}")]
        row = run(words, figures.watch, figures.left())
        del row["stdout"]
        most = max(row["above_bytes"])
        used = most > 64 * MIB
        kept = (row["exit_code"] == 0 and most <= budget * GIB) or (row["exit_code"] == 3 and not used)
        record = read_record(folder / f"promise{index}") or {}
        sizes = {
            name: value
            for name, value in record.get("config", {}).get("optimization", {}).items()
            if name.endswith("_size")
        }
        asked = {"task": task, "size": size, "frames": frames, "budget_bytes": int(budget * GIB)}
        figures.add({"figure": "promise", "index": index, **asked, "kept": kept, "sizes": sizes, **row})


def same(args: argparse.Namespace, folder: Path) -> None:
    """Frames of every way against one GPU's: equal, or how far; and how far one GPU's are from float32's."""
    figures = Figures(args)
    task, size, _ = CASES[args.case]
    chosen = {
        "one": [],
        "one in float32": ["--precision", "fp32"],
        **{k: v for k, v in ways(args.gpus).items() if k != "one"},
    }
    first: Any = None
    for name, flags in chosen.items():
        if figures.left() < 40:
            figures.left_out(name)
            continue
        directory = folder / f"same_{len(name)}_{abs(hash(name))}"
        words = ["generate", "--task", task, "--size", size, "--frame_num", str(args.frames), "--sample_steps", "3"]
        words += ["--base_seed", "7", "--prompt", "x", "--weights", "random", *STREAMED, *flags, "-o", str(directory)]
        row = run(words, figures.watch, figures.left())
        found = next(directory.glob("video*.mp4"), None)
        del row["stdout"]
        if found is not None:
            frames = _frames(found)
            first = frames if first is None else first
            apart = abs(frames.astype(int) - first.astype(int))
            row |= {
                "equal": bool((apart == 0).all()),
                "mean_apart": float(apart.mean()),
                "most_apart": int(apart.max()),
            }
        figures.add({"figure": "same", "case": args.case, "way": name, **row})


def _frames(path: Path) -> Any:
    import av
    import numpy as np

    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def faults(args: argparse.Namespace, folder: Path) -> None:
    """One rank killed with -9 while all are at work: how long until the command has ended, what is left, what the record says."""
    figures = Figures(args)
    for index in range(args.count * args.gpus):
        if figures.left() < 60:
            figures.left_out(f"faults from {index}")
            return
        rank, draw = index % args.gpus, random.Random(f"{args.seed} {index}")
        directory = folder / f"fault{index}"
        words = [
            "generate",
            "--task",
            "t2v-1.3B",
            "--size",
            "832*480",
            "--sample_steps",
            "50",
            "--base_seed",
            "1",
            "--prompt",
            "x",
        ]
        words += [
            "--weights",
            "random",
            *STREAMED,
            *ways(args.gpus)[draw.choice(("cfg", "ulysses", "ring"))],
            "-o",
            str(directory),
        ]
        before = figures.watch.now()
        process = subprocess.Popen(
            [sys.executable, "-m", "wanvram", *words],
            env=environment_of_a_person(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        pids = _ranks_of(process.pid, args.gpus)
        time.sleep(draw.uniform(4.0, 25.0))
        start = time.monotonic()
        if rank in pids and process.poll() is None:
            os.kill(pids[rank], signal.SIGKILL)
        try:
            _, said = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
        seconds = time.monotonic() - start
        after = figures.watch.settled(before)
        alive = [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("record*.json"))]
        failure = next((record["failure"] for record in records if record["failure"]), None)
        row = {
            "figure": "fault",
            "index": index,
            "rank": rank,
            "exit_code": process.returncode,
            "seconds": round(seconds, 2),
        }
        row |= {"left_bytes": [a - b for a, b in zip(after, before, strict=True)], "alive": len(alive)}
        figures.add(row | {"failure": failure, "stderr": said[-400:]})


def _ranks_of(pid: int, count: int) -> dict[int, int]:
    """Process of every rank, once all have begun."""
    import psutil

    found: dict[int, int] = {}
    for _ in range(600):
        for child in psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []:
            with suppress(psutil.Error, ValueError):
                found[int(child.environ()["RANK"])] = child.pid
            with suppress(KeyError):
                continue
        if len(found) == count:
            break
        time.sleep(0.1)
    return found


def diffusers(args: argparse.Namespace, _: Path) -> None:
    """Whole weights on every GPU, as diffusers' context parallel wants them."""
    figures = Figures(args)
    for name in ("one", "ulysses", "ring"):
        if figures.left() < 60:
            figures.left_out(f"diffusers {name}")
            continue
        count = 1 if name == "one" else args.gpus
        script = str(Path(__file__).resolve())
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        words = [
            sys.executable,
            *launcher,
            script,
            "diffusers_rank",
            "--case",
            args.case,
            "--only",
            name,
            "--gpus",
            str(args.gpus),
        ]
        with figures.watch:
            ended = subprocess.run(
                words, env=environment_of_a_person(), capture_output=True, text=True, timeout=figures.left()
            )
        told = [line for line in ended.stdout.splitlines() if line.startswith("{")]
        row = json.loads(told[-1]) if told else {"stderr": ended.stderr[-800:]}
        figures.watch.settled(figures.watch.before)
        row |= {"figure": "diffusers", "case": args.case, "way": name, "gpus": count, "exit_code": ended.returncode}
        figures.add(row | {"above_bytes": figures.watch.above()})


def diffusers_rank(args: argparse.Namespace, _scratch: Path) -> None:
    import torch
    import torch.distributed as dist
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    heads, layers, ffn = (12, 30, 8960) if args.case.startswith("1.3B") else (40, 40, 13824)
    frame = (90, 160) if args.case.endswith("720P") else (60, 104)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = WanTransformer3DModel(num_attention_heads=heads, num_layers=layers, ffn_dim=ffn).eval()
        latent, text = torch.randn(1, 16, 21, *frame), torch.randn(1, 512, 4096)
    if world > 1:
        degree = {"ulysses_degree": world} if args.only == "ulysses" else {"ring_degree": world}
        model.set_attention_backend("_native_cudnn")
        model.enable_parallelism(config=ContextParallelConfig(**degree))
    times = []
    with torch.no_grad():
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(2):
                model(
                    hidden_states=latent,
                    timestep=torch.tensor([500], device="cuda"),
                    encoder_hidden_states=text,
                    return_dict=False,
                )
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps({"step_seconds": min(times), "reserved_bytes": torch.cuda.max_memory_reserved()}), flush=True)
    dist.destroy_process_group()


# --- judging -----------------------------------------------------------------------------------------------------------------


def breaches_of(rows: Sequence[Row]) -> list[str]:
    """Bounds that were missed."""
    found = []
    for row in rows:
        name = f"{row.get('case', '')} {row.get('way', row.get('index', ''))} of {row['figure']}"
        if row["figure"] == "layout":
            found += [f"{name}: {text}" for text in _missed_by_layout(row)]
        elif row["figure"] == "promise" and not row["kept"]:
            found.append(
                f"{name}: {row['budget_bytes']} bytes, used {row['above_bytes']}, exit code {row['exit_code']}"
            )
        elif row["figure"] == "fault" and (
            row["seconds"] > MOST_SECONDS or row["alive"] or max(row["left_bytes"]) > MIB
        ):
            found.append(f"{name}: {row['seconds']} s, {row['alive']} processes and {row['left_bytes']} bytes left")
        elif row["figure"] == "same" and row["way"] in ("cfg, shards", "cfg") and not row.get("equal"):
            found.append(f"{name}: frames are not those of one GPU")
    found += _missed_by_frames([row for row in rows if row["figure"] == "same" and "mean_apart" in row])
    shared = [row for row in rows if row["figure"] == "layout" and row.get("stages")]
    stages = sum(row["stages"] for row in shared)
    for figure in ("equal_allocated", "equal_reserved"):
        equal = sum(row[figure] for row in shared)
        if stages and equal < EQUAL_SHARE * stages:
            found.append(f"{figure}: {equal} of {stages} stages")
    return found


def _missed_by_frames(rows: Sequence[Row]) -> list[str]:
    """Where sums are reordered frames may be as far from one GPU's as float32's are."""
    limits = {row["case"]: row["mean_apart"] for row in rows if row["way"] == "one in float32"}
    reordered = [row for row in rows if row["way"].startswith(("ulysses", "ring")) and row["case"] in limits]
    return [
        f"{row['case']} {row['way']}: frames are {row['mean_apart']:.4f} apart, float32's {limits[row['case']]:.4f}"
        for row in reordered
        if row["mean_apart"] > limits[row["case"]]
    ]


def _missed_by_layout(row: Row) -> list[str]:
    found = []
    two = row["case"] == "14B-720P" and row["gpus"] == 2
    if row["exit_code"] != 0:
        return [f"exit code {row['exit_code']}: {row['stderr'][-200:]}"]
    if two and row["way"] in LEAST and (row["speedup"] or 0) < LEAST[row["way"]]:
        found.append(f"{row['speedup']} times as fast, not {LEAST[row['way']]}")
    if two and row["way"] == "ulysses" and max(row["above_bytes"]) > MOST_BYTES:
        found.append(f"{max(row['above_bytes'])} bytes of a GPU, more than {MOST_BYTES}")
    if row.get("step_error") is not None and abs(row["step_error"]) > STEP_ERROR:
        found.append(f"a step is predicted {row['step_error']:+.1%}")
    for rank, (guess, used) in enumerate(zip(row.get("predicted_device_bytes", []), row["above_bytes"], strict=False)):
        if abs(guess / max(1, used) - 1) > DEVICE_ERROR:
            found.append(f"rank {rank}: {guess} bytes predicted, {used} measured")
    return found


def judge(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    kept = path.suffix == ".json"  # rows of several calls, put together
    missed = breaches_of(
        rows := json.loads(text)["rows"] if kept else [json.loads(line) for line in text.splitlines() if line]
    )
    print(json.dumps({"figures": len(rows), "missed": len(missed)}))
    for text in missed:
        print(f"BROKEN {text}")
    return 1 if missed else 0


PARTS = {part.__name__: part for part in (layouts, predict, promise, same, faults, diffusers, diffusers_rank)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "judge"])
    parser.add_argument("file", nargs="?", type=Path, help="of judge")
    parser.add_argument("--case", choices=sorted(CASES), default="14B-720P")
    parser.add_argument("--only", help="ways of sharing, by semicolons; one GPU comes first in any case")
    parser.add_argument("--skip_one", action="store_true", help="no figure of one GPU, and so no speedups")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--card", default="h200", help="as `wanvram estimate --gpu` knows it")
    parser.add_argument("--link", help="of `predict`: what joins the cards")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=33, help="of `same`")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("several_gpus.jsonl"))
    args = parser.parse_args()
    if args.part == "judge":
        return judge(args.file)
    with tempfile.TemporaryDirectory() as name:
        PARTS[args.part](args, Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())

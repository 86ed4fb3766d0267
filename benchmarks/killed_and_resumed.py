"""Is a video that was killed with -9 in the middle and resumed the uninterrupted one, bit for bit?

    python benchmarks/killed_and_resumed.py --lanes 5                       ten kills on a GPU, under 4 minutes on an H200
    python benchmarks/killed_and_resumed.py --checkpoint DIR                also resumed with the weights held in other ways
    python benchmarks/killed_and_resumed.py --tiny --kills 2 --out /tmp     anywhere: tries this script on the CPU

t2v-1.3B, 832*480, 17 frames, 12 steps with random weights, each run a process of its own through `wanvram generate`. Two runs are not
interrupted: one keeps nothing, one its state after every step; their memory by stage must be equal to the byte, and what keeping costs
of a step is written down. Then `--kills` runs are killed, each a random moment after a random step (`--seed`), and go on with
`--resume`. The final latent (taken from kept.safetensors while the run decodes) and all frames of the video must be those of the
uninterrupted run. Random weights are drawn where they are held, so only those of a checkpoint can be held in another way afterwards.

Writes <out>/<date>_<gpu>_killed_and_resumed.json; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import ROOT, ResultFile, circumstances, conclude, environment_of_a_person, read_record

from wanvram.errors import InputError
from wanvram.kept_state import KEPT_NAME, read_kept_run

STEPS = 12
TIMEOUT_S = 300.0
POLL_S = 0.005
WANVRAM = [sys.executable, "-m", "wanvram", "generate"]
FULL = ("--load_strategy", "full", "--weights_in", "pinned")
OTHERS = ((), FULL, ("--load_strategy", "block", "--weights_in", "pageable"))  # with a checkpoint, in turn
FIGURES = ("peak_allocated_bytes", "peak_reserved_bytes", "end_allocated_bytes", "end_reserved_bytes")


@dataclass(frozen=True)
class Ended:
    """steps: that were kept when it ended. latent: sha256 of the finished one, None where the run did not get to it."""

    code: int
    seconds: float
    steps: int
    latent: str | None
    stderr: str


def command(arguments: argparse.Namespace, run: Path, every: int) -> list[str]:
    if arguments.tiny:
        size = ["--weights", "tiny", "--size", "128*80", "--frame_num", "9"]
    else:
        weights = str(arguments.checkpoint) if arguments.checkpoint else "random"
        size = ["--weights", weights, "--size", "832*480", "--frame_num", "17", "--precision", "bf16"]
    what = ["--task", "t2v-1.3B", "--sample_steps", str(STEPS), "--base_seed", "1", "--prompt", "a cat on a skateboard"]
    return [*WANVRAM, *what, *size, "--keep_every", str(every), "-o", str(run)]


def finished_steps(run: Path) -> int:
    """That are kept now; 0 also while there is no such file."""
    try:
        return read_kept_run(run / KEPT_NAME).steps().get(0, 0)
    except InputError:
        return 0


def finished_latent(run: Path) -> str | None:
    """What follows the header of the kept file, which then holds nothing but the finished latent."""
    try:
        data = (run / KEPT_NAME).read_bytes()
    except OSError:
        return None
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def follow(words: list[str], run: Path, kill_after: int | None, delay: float) -> Ended:
    """Runs the command to its end, or kills it `delay` seconds after so many steps are kept."""
    start, latent, steps = time.monotonic(), None, 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=said, env=environment_of_a_person(), cwd=run.parent
        )
        while process.poll() is None and time.monotonic() - start < TIMEOUT_S:
            steps = finished_steps(run) if (run / KEPT_NAME).exists() else steps
            if kill_after is not None and steps >= kill_after:
                time.sleep(delay)
                break
            if steps == STEPS and latent is None:
                latent = finished_latent(run)
            time.sleep(POLL_S)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    steps = finished_steps(run) if (run / KEPT_NAME).exists() else steps
    return Ended(process.returncode, time.monotonic() - start, steps, latent, text)


def frames_of(run: Path) -> str | None:
    """sha256 of the decoded frames."""
    import av

    path, digest = run / "video.mp4", hashlib.sha256()
    if not path.exists():
        return None
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            digest.update(frame.to_ndarray(format="yuv420p").tobytes())
    return digest.hexdigest()


def memory_of(run: Path) -> list[list[Any]]:
    """By stage and load, each with its figures."""
    stages = (read_record(run) or {}).get("stages", [])
    return [[stage["name"], *(stage[figure] for figure in FIGURES)] for stage in stages]


def denoise_seconds(run: Path) -> float | None:
    """Of all steps with what is between them, where state is kept."""
    stages = [s for s in (read_record(run) or {}).get("stages", []) if s["part"] == "denoise"]
    return sum(stage["seconds"] for stage in stages) if stages else None


def uninterrupted(arguments: argparse.Namespace, home: Path, every: int) -> tuple[dict[str, Any], list[list[Any]]]:
    run = home / f"whole-{every}"
    ended = follow(command(arguments, run, every), run, None, 0.0)
    row = {"kind": "uninterrupted", "keep_every": every, "code": ended.code, "seconds": round(ended.seconds, 2)}
    row |= {"latent": ended.latent, "frames": frames_of(run), "denoise_seconds": denoise_seconds(run), "wrong": []}
    if ended.code != 0:
        row["wrong"] = [f"exit code {ended.code}: {ended.stderr[-400:]}"]
    return row, memory_of(run)


def killed(arguments: argparse.Namespace, home: Path, number: int, usual: dict[str, Any]) -> dict[str, Any]:
    rng = random.Random(arguments.seed * 1000 + number)
    after, share = rng.randint(1, STEPS - 1), rng.random()
    run = home / f"killed-{number}"
    first = follow(command(arguments, run, 1), run, after, share * (usual["denoise_seconds"] or 0.0) / STEPS)
    flags = OTHERS[number % len(OTHERS)] if arguments.checkpoint else ()
    second = follow([*WANVRAM, "--resume", str(run), *flags], run, None, 0.0)
    resumed = (read_record(run) or {}).get("resumed") or {}
    row = {
        "kind": "killed",
        "after_step": after,
        "into_the_next": round(share, 3),
        "resumed_with": " ".join(flags),
        "codes": [first.code, second.code],
        "steps_before": resumed.get("steps"),
        "seconds": [round(first.seconds, 2), round(second.seconds, 2)],
        "first_line": second.stderr.partition("\n")[0].replace(str(home), ""),
    }
    return row | {"wrong": judged(usual, first, second, row, frames_of(run))}


def judged(usual: dict[str, Any], first: Ended, second: Ended, row: dict[str, Any], frames: str | None) -> list[str]:
    wrong = []
    if first.code != -signal.SIGKILL:
        wrong.append(f"it ended by itself with exit code {first.code}: {first.stderr[-400:]}")
    if second.code != 0:
        wrong.append(f"resumed it ends with exit code {second.code}: {second.stderr[-400:]}")
    if row["steps_before"] != [first.steps] or first.steps < row["after_step"]:
        wrong.append(f"it was killed with {first.steps} steps kept, the record says {row['steps_before']}")
    if second.latent != usual["latent"]:
        wrong.append(f"the latent is {second.latent}, not {usual['latent']}")
    if frames != usual["frames"]:
        wrong.append(f"the frames are {frames}, not {usual['frames']}")
    return wrong


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    breaches = [
        f"{row['kind']} {row.get('after_step', row.get('keep_every'))}: {w}" for row in rows for w in row["wrong"]
    ]
    kills = [row for row in rows if row["kind"] == "killed"]
    each = {str(row["keep_every"]): row["denoise_seconds"] for row in rows if row["kind"] == "uninterrupted"}
    equal = sum(not row["wrong"] for row in kills)
    return {"kills": len(kills), "equal": equal, "denoise_seconds_by_keep_every": each, "breaches": breaches}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="resumed-"))
    place = "cpu" if arguments.tiny else gpu_name()
    path = arguments.out / f"{datetime.date.today()}_{place}_killed_and_resumed.json"
    header = {"schema": 1, "gpu": place, "steps": STEPS, "seed": arguments.seed, "lanes": arguments.lanes}
    header["circumstances"] = circumstances("killed_and_resumed.py", "provenance.py")
    result = ResultFile(path, header, summary)
    plain, without = uninterrupted(arguments, home, 0)
    usual, memory = uninterrupted(arguments, home, 1)
    if memory != without and not arguments.tiny:  # the CPU's memory is that of the process
        usual["wrong"].append(f"keeping changed memory: {[a for a, b in zip(memory, without, strict=False) if a != b]}")
    if usual["frames"] != plain["frames"] or usual["latent"] is None:
        usual["wrong"].append("two uninterrupted runs differ, or the latent was not seen")
    result.append(plain)
    result.append(usual)
    with ThreadPoolExecutor(arguments.lanes) as lanes:
        rows = [lanes.submit(killed, arguments, home, number, usual) for number in range(arguments.kills)]
        for row in rows:
            result.append(row.result())
    print(f"Wrote {path}")
    return conclude(summary(result.rows))


def gpu_name() -> str:
    from wanvram.machine.nvml import first_gpu
    from wanvram.simulate.gpus import find_gpu

    gpu = first_gpu()
    return find_gpu(gpu.name, gpu.memory()[1]).argument


if __name__ == "__main__":
    sys.exit(main())

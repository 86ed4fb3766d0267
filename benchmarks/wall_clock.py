"""How long does a whole command take, and had it said so? Wall clock of `wanvram generate` as typed, cold and at once again, warm.

    python benchmarks/random_checkpoint.py /tmp/wan-14B --task t2v-14B                         40 GB, for the cases from disk
    python benchmarks/wall_clock.py run --checkpoint /tmp/wan-14B --out benchmarks/2026-11-28_h100_wall_clock.json
    python benchmarks/wall_clock.py run --only 1.3B-480P-2,t2i-14B --out some.json
    python benchmarks/wall_clock.py add a.json b.json -o benchmarks/2026-11-28_h100_wall_clock.json
    python benchmarks/wall_clock.py list                                                       prints the commands; no GPU

The stopwatch is this process's, from the start of the command until it has ended: Python, imports, planning, loading, the video.
Cold: Triton's cache is an empty directory of its own, and the pages of a checkpoint are not in RAM (asked of the kernel: mincore).
Warm: the same command once more, with that cache and those pages. PyTorch's own files are in RAM in both, of one command that is
not counted. The prediction is the command's own, from its record. Each must be within 15 %, cold and warm; exit code 1 if one is
not, if a command fails or says nothing, or if fewer than --least configurations ran (default: all of those asked for).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nvml_watch import gpu_facts, gpu_of
from PIL import Image
from provenance import ResultFile, circumstances, conclude, environment_of_a_person, prediction_of, read_record

__all__ = ["CONFIGURATIONS", "Configuration", "judge", "judge_run", "typed"]

SCRIPTS = ("wall_clock.py", "random_checkpoint.py", "nvml_watch.py", "provenance.py")
MOST_ERROR = 0.15  # of the predicted against the measured wall clock
COLD_SHARE = 0.01  # of a checkpoint's pages that may be in RAM when it counts as cold
WARM_SHARE = 0.99  # and that must be when it counts as read from the page cache
LARGE, SMALL = "14B", "1.3B"
PICTURE = "cat.png"
Row = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """flags of `wanvram generate` without the weights. checkpoint: which one on the disk; None: random weights."""

    name: str
    flags: str
    checkpoint: str | None = None


CONFIGURATIONS = tuple(
    Configuration(*fields)
    for fields in (
        ("1.3B-480P-2", "--task t2v-1.3B --size 832*480 --sample_steps 2 --vram_budget 8GiB"),
        ("1.3B-480P-10", "--task t2v-1.3B --size 832*480 --sample_steps 10"),
        ("1.3B-480P-50", "--task t2v-1.3B --size 480*832 --sample_steps 50 --load_strategy full --precision bf16"),
        ("14B-480P-2", "--task t2v-14B --size 832*480 --sample_steps 2 --vram_budget 12GiB"),
        ("14B-480P-50", "--task t2v-14B --size 832*480 --frame_num 17 --sample_steps 50 --load_strategy full"),
        ("14B-720P-2", "--task t2v-14B --size 1280*720 --frame_num 17 --sample_steps 2 --precision bf16"),
        (
            "i2v-14B",
            f"--task i2v-14B --size 832*480 --frame_num 33 --sample_steps 4 --image {PICTURE} --vram_budget 20GiB",
        ),
        ("t2i-14B", "--task t2i-14B --size 1024*1024 --sample_steps 8 --load_strategy full --precision bf16"),
        ("1.3B-checkpoint", "--task t2v-1.3B --size 832*480 --frame_num 33 --sample_steps 4 --vram_budget 6GiB", SMALL),
        ("14B-checkpoint", "--task t2v-14B --size 832*480 --frame_num 17 --sample_steps 2 --weights_in pinned", LARGE),
        ("14B-disk", "--task t2v-14B --size 832*480 --frame_num 17 --sample_steps 2 --weights_in disk", LARGE),
    )
)


def typed(configuration: Configuration, checkpoints: Mapping[str, Path], output: str) -> list[str]:
    weights = "random" if configuration.checkpoint is None else str(checkpoints[configuration.checkpoint])
    words = ["wanvram", "generate", *configuration.flags.split(), "--ckpt_dir", weights, "--base_seed", "1"]
    return [*words, "--prompt", "a cat on a skateboard", "-o", output]


# --- judging -----------------------------------------------------------------------------------------------------------------


def judge_run(row: Mapping[str, Any]) -> list[str]:
    """Every bound that one run of a command missed."""
    if row["exit_code"] != 0:
        return [f"failed with exit code {row['exit_code']}: {row['stderr_tail'][-300:]}"]
    breaches = []
    pages = row["pages_in_ram"]
    if pages is not None and (pages > COLD_SHARE if row["cold"] else pages < WARM_SHARE):
        breaches.append(f"{pages:.1%} of the checkpoint were in RAM before it")
    if row["predicted_seconds"] is None:
        return [*breaches, "no prediction in its record"]
    predicted, measured = row["predicted_seconds"], row["seconds"]
    if abs(predicted - measured) > MOST_ERROR * measured:
        breaches.append(f"{predicted:.1f} s predicted, {measured:.1f} s measured: {predicted / measured - 1:+.1%}")
    return breaches


def judge(rows: Sequence[Row], least: int) -> dict[str, Any]:
    """Counts, range and all breaches; fine if `breaches` is empty. A configuration counts with both of its runs."""
    breaches = [f"{row['name']} {label(row)}: {text}" for row in rows for text in judge_run(row)]
    runs = {(row["name"], row["cold"]) for row in rows}
    whole = [name for name in dict.fromkeys(row["name"] for row in rows) if {(name, True), (name, False)} <= runs]
    if len(whole) < least:
        breaches.append(f"{len(whole)} configurations ran cold and warm, at least {least} must")
    known = [row for row in rows if row["exit_code"] == 0 and row["predicted_seconds"] is not None]
    errors = [row["predicted_seconds"] / row["seconds"] - 1 for row in known]
    return {
        "configurations": len(whole),
        "runs": len(rows),
        "within": sum(not judge_run(row) for row in rows),
        "error": [min(errors), max(errors)] if errors else None,
        "breaches": breaches,
    }


def label(row: Mapping[str, Any]) -> str:
    return "cold" if row["cold"] else "warm"


# --- pages of a checkpoint ---------------------------------------------------------------------------------------------------


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*.safetensors") if path.is_file())


def evict(directory: Path) -> None:
    """Out of the page cache, where the kernel agrees; as root with everything else there, where it does not."""
    for path in files_of(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if share_in_ram(directory) > COLD_SHARE and os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def warm_up(directory: Path) -> None:
    """Into the page cache. What a run has read is there already; parts that it skips, such as most of T5's table, are not."""
    for path in files_of(directory):
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(64 * 2**20)
            while file.readinto(buffer):
                pass


def share_in_ram(directory: Path) -> float:
    """Of the pages of the checkpoint's files, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    inside = total = 0
    for path in files_of(directory):
        size = path.stat().st_size
        pages = -(-size // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view,
        ):
            start = ctypes.c_char.from_buffer(view)  # a private mapping, never written: only its address is wanted
            failed = libc.mincore(ctypes.addressof(start), size, states)
            del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        inside += sum(bytes(states).translate(_LOWEST_BIT))
        total += pages
    return inside / total if total else 0.0


_LOWEST_BIT = bytes(value & 1 for value in range(256))


# --- running -----------------------------------------------------------------------------------------------------------------


def run_once(configuration: Configuration, checkpoints: Mapping[str, Path], directory: Path, *, cold: bool) -> Row:
    """Types the command in `directory` and stops the time. The Triton cache is there: empty when cold."""
    checkpoint = checkpoints[configuration.checkpoint] if configuration.checkpoint else None
    if checkpoint is not None:
        (evict if cold else warm_up)(checkpoint)
    pages = share_in_ram(checkpoint) if checkpoint is not None else None
    output = "cold" if cold else "warm"
    command = typed(configuration, checkpoints, output)
    env = environment_of_a_person(TRITON_CACHE_DIR=str(directory / "triton"))
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", *command], cwd=directory, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )  # fmt: skip
    seconds = time.monotonic() - start
    record = read_record(directory / output)
    predicted = prediction_of(record) if record else {}
    return {
        "name": configuration.name,
        "cold": cold,
        "command": shlex.join(command),
        "pages_in_ram": pages,
        "exit_code": ended.returncode,
        "seconds": seconds,
        "predicted_seconds": predicted.get("seconds"),
        "predicted": predicted,
        "stages": {f"{n} {s['name']}": s["seconds"] for n, s in enumerate(record["stages"])} if record else {},
        "strategy": record["config"]["optimization"] if record else None,
        "failure": record["failure"] if record else None,
        "notes": record["notes"] if record else [],
        "stderr_tail": "\n".join(ended.stderr.splitlines()[-30:]),
    }


def run_all(args: argparse.Namespace, chosen: Sequence[Configuration], results: ResultFile) -> None:
    checkpoints = _checkpoints(args.checkpoint, chosen)
    start = time.monotonic()
    _read_the_libraries()
    for configuration in chosen:
        with tempfile.TemporaryDirectory() as name:
            Image.effect_noise((832, 480), 60).convert("RGB").save(Path(name) / PICTURE)
            for cold in (True, False):
                if time.monotonic() - start > args.seconds:
                    results.header["not_started"].append(f"{configuration.name} {'cold' if cold else 'warm'}")
                    continue
                row = run_once(configuration, checkpoints, Path(name), cold=cold)
                row["breaches"] = judge_run(row)
                results.append(row)
                print(line_of(row), flush=True)


def _read_the_libraries() -> None:
    """Python and PyTorch from the disk into RAM: a machine reads them once, not once a command."""
    text = "import torch, triton, wanvram.cli.generate, wanvram.run.execute; torch.cuda.is_available()"
    subprocess.run([sys.executable, "-c", text], check=False, env=environment_of_a_person(), capture_output=True)


def _checkpoints(large: Path | None, chosen: Sequence[Configuration]) -> dict[str, Path]:
    """The given one, and beside it a small one that shares its text encoder and VAE, made here if it is not there."""
    wanted = {configuration.checkpoint for configuration in chosen} - {None}
    if not wanted:
        return {}
    if large is None:
        names = ", ".join(configuration.name for configuration in chosen if configuration.checkpoint)
        raise SystemExit(
            f"--checkpoint DIR is needed for {names}; make one with random_checkpoint.py, or leave them out with --only"
        )
    large = large.absolute()
    small = large.with_name(large.name + "-small")
    if SMALL in wanted and not small.exists():
        script = Path(__file__).with_name("random_checkpoint.py")
        command = [sys.executable, str(script), str(small), "--task", "t2v-1.3B", "--share", str(large)]
        subprocess.run(command, check=True, env=environment_of_a_person())
    return {LARGE: large, SMALL: small}


def line_of(row: Mapping[str, Any]) -> str:
    text = f"{row['name']:16s} {label(row)} {row['seconds']:7.1f} s"
    if row["predicted_seconds"] is not None:
        text += f", predicted {row['predicted_seconds']:7.1f} s ({row['predicted_seconds'] / row['seconds'] - 1:+.1%})"
    return text + "".join(f"; {breach}" for breach in row["breaches"])


def run(args: argparse.Namespace) -> int:
    import pynvml

    names = args.only.split(",") if args.only else [configuration.name for configuration in CONFIGURATIONS]
    unknown = sorted(set(names) - {configuration.name for configuration in CONFIGURATIONS})
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: unknown; `list` shows the names")
    by_name = {configuration.name: configuration for configuration in CONFIGURATIONS}
    chosen = [by_name[name] for name in dict.fromkeys(names)]
    pynvml.nvmlInit()
    card = gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    facts = gpu_facts(pynvml, card)
    header = {
        "benchmark": "wall_clock",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **circumstances(*SCRIPTS),
        "card": facts["name"],
        "driver": facts["driver"],
        "gpu_before": facts,
        "checkpoint": _filesystem(args.checkpoint) if args.checkpoint else None,
        "not_started": [],
    }
    least = len(chosen) if args.least is None else args.least
    results = ResultFile(args.out, header, lambda rows: judge(rows, least))
    run_all(args, chosen, results)
    results.header["gpu_after"] = gpu_facts(pynvml, card)
    results.write()
    return conclude(judge(results.rows, least))


def _filesystem(directory: Path) -> dict[str, Any]:
    """What the checkpoint is read from."""
    import psutil

    mounts = [part for part in psutil.disk_partitions(all=True) if directory.absolute().is_relative_to(part.mountpoint)]
    mount = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    size = sum(path.stat().st_size for path in files_of(directory))
    return {"bytes": size, "filesystem": mount.fstype if mount else None, "device": mount.device if mount else None}


def add(args: argparse.Namespace) -> int:
    """One document of several calls of the same code on the same kind of card, every row of each."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    for key in ("benchmark", "source_sha256", "card", "driver", "torch"):
        values = {json.dumps(document[key]) for document in documents}
        if len(values) > 1:
            raise SystemExit(f"these calls cannot be added up: {key} is {' and '.join(sorted(values))}")
    header = {key: value for key, value in documents[0].items() if key not in ("rows", "summary")}
    header["note"] = (
        f"{len(documents)} calls of one code added up, every row of each: {', '.join(p.name for p in args.files)}"
    )
    header["each_call"] = [
        {key: d.get(key) for key in ("started", "gpu_before", "gpu_after", "not_started")} for d in documents
    ]
    results = ResultFile(args.out, header, lambda rows: judge(rows, args.least))
    results.rows = [row for document in documents for row in document["rows"]]
    results.write()
    return conclude(judge(results.rows, args.least))


def show(_: argparse.Namespace) -> int:
    places = {LARGE: Path("/tmp/wan-14B"), SMALL: Path("/tmp/wan-14B-small")}
    for configuration in CONFIGURATIONS:
        print(f"{configuration.name:16s} {shlex.join(typed(configuration, places, 'cold'))}")
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = result.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run")
    verb.set_defaults(function=run)
    verb.add_argument(
        "--only", default="", help="names of configurations, comma separated, in the order in which they run"
    )
    verb.add_argument("--checkpoint", type=Path, help="directory of the 40 GB checkpoint")
    verb.add_argument("--seconds", type=float, default=1e9, help="start no further command after this many seconds")
    verb.add_argument("--least", type=int, help="configurations that must run cold and warm (default: all asked for)")
    verb.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    verb = verbs.add_parser("add")
    verb.set_defaults(function=add)
    verb.add_argument("files", type=Path, nargs="+")
    verb.add_argument("--least", type=int, default=10, help="configurations that must have run")
    verb.add_argument("-o", "--out", type=Path, required=True)
    verbs.add_parser("list").set_defaults(function=show)
    return result


def main() -> int:
    args = parser().parse_args()
    return int(args.function(args))


if __name__ == "__main__":
    sys.exit(main())

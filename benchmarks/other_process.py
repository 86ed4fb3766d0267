"""What happens to a run when another process takes the GPU's memory in the middle of it?

    python benchmarks/other_process.py                                  on the GPU, about a minute
    python benchmarks/other_process.py --once                           what is free is taken once, not again and again
    python benchmarks/other_process.py --device cpu --tiny --out /tmp   anywhere: tries this script, nothing is taken

`wanvram profile --json` runs t2v-1.3B, 832*480, 33 frames, 8 steps with random weights, the VAE on whole frames and no memory limit.
The end of its first denoising step is seen in the run directory's memory_events.json, which is read every 20 ms (with --json and no
terminal nothing is written on stderr meanwhile). Then a second process, which has its CUDA context already, takes all but --leave MiB
of what is free with torch.empty, and again whatever the run gives back when the transformer goes: without that the decoder would lack
less than 1 GiB. The decode has to fail. Checked: exit code 1, no traceback, a sentence, what was recorded before, and that the run
ends --limit seconds after the memory was taken; else it is killed and HANGS is printed.

Where the driver does not tell processes apart (most containers), the record's device memory includes what the other one took.
Writes <out>/<date>_<gpu>_other_process.json; the exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
POLL_SECONDS = 0.02
BEGIN_SECONDS = 300  # until the first step has ended: weights are generated, kernels compiled
KEPT = ("load text_encoder", "encode_text", "load dit", "denoise")  # stages finished before the failure
FILES = ("config.yaml", "environment.json", "memory_events.json", "record.json")

# Arguments: bytes to leave, 1 to take once. Lines on stdout: `ready`, then the bytes of every taking; ends with stdin.
OTHER = """
import select, sys, torch
leave, once = int(sys.argv[1]), sys.argv[2] == "1"
held = [torch.empty(1, device="cuda")]
print("ready", flush=True)
sys.stdin.readline()
while True:
    spare = (torch.cuda.mem_get_info()[0] - leave) // 2**21 * 2**21
    if spare >= 64 * 2**20:
        try:
            held.append(torch.empty(spare, dtype=torch.uint8, device="cuda"))
            print(spare, flush=True)
        except torch.OutOfMemoryError:
            continue  # the run took it between the question and the allocation
    if select.select([sys.stdin], [], [], None if once else 0.02)[0]:
        break
"""
TAKES_NOTHING = 'import sys; print("ready", flush=True); sys.stdin.readline(); print(0, flush=True); sys.stdin.read()'


@dataclass(frozen=True)
class Ended:
    """How the run ended. exit_code None: it was killed, over the time limit. seconds: since the memory was taken."""

    exit_code: int | None
    seconds: float | None
    after_event: str | None
    taken: list[int]
    stdout: str
    stderr: str


def configuration(tiny: bool) -> dict[str, Any]:
    size, frames = ("192*96", 5) if tiny else ("832*480", 33)  # the CPU would take minutes
    request = {"task": "t2v-1.3B", "size": size, "frame_num": frames, "sample_steps": 8, "base_seed": 1}
    return {
        "name": "other_process",
        "description": "the whole decode needs more than another process leaves",
        "model_config": {"precision": "bf16", "load_strategy": "full", "offload": True},
        "request": request | {"weights": "tiny" if tiny else "random"},
    }


def first_step_event(path: Path) -> str | None:
    """The last event, once a denoising step has ended."""
    try:
        events = json.loads(path.read_text())
    except (OSError, ValueError):  # not there yet, or read while an event was written
        return None
    steps = [event for event in events if (event["metadata"] or {}).get("kind") == "step"]
    return str(events[-1]["name"]) if steps else None


def start_other(cpu: bool, leave: int, once: bool) -> subprocess.Popen[str]:
    """The second process, when it needs nothing more than the word to take memory."""
    program = ["-c", TAKES_NOTHING] if cpu else ["-c", OTHER, str(leave), str(int(once))]
    other = subprocess.Popen([sys.executable, *program], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    if other.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the second process did not begin, exit code {other.wait()}")
    return other


def take(other: subprocess.Popen[str]) -> int:
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.write("take\n")
    other.stdin.flush()
    line = other.stdout.readline()
    if not line:
        raise RuntimeError(f"the second process took nothing, exit code {other.wait()}")
    return int(line)


def end_other(other: subprocess.Popen[str]) -> list[int]:
    """Ends it; what it took after the first time."""
    try:
        return [int(line) for line in other.communicate(timeout=30)[0].split()]
    except subprocess.TimeoutExpired:
        other.kill()
        other.communicate()
        return []


def wait_for_step(run: subprocess.Popen[bytes], events: Path) -> str | None:
    """None if the run ended, or took too long, before a step had ended."""
    end = time.monotonic() + BEGIN_SECONDS
    while time.monotonic() < end and run.poll() is None:
        if (name := first_step_event(events)) is not None:
            return name
        time.sleep(POLL_SECONDS)
    return None


def run_beside(other: subprocess.Popen[str], command: list[str], scratch: Path, limit: float) -> Ended:
    """Starts the run, lets the second process take memory after the first step, and waits for the run's end."""
    start, seconds, taken = time.monotonic(), None, []
    # Files, not pipes: nobody reads while the run goes on, and a full pipe would look like a hanging run.
    with (scratch / "stdout").open("wb") as stdout, (scratch / "stderr").open("wb") as stderr:
        run = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        try:
            event = wait_for_step(run, scratch / "run" / "memory_events.json")
            print(f"{time.monotonic() - start:.1f} s: last event in memory_events.json: {event}", flush=True)
            if event is not None:
                taken.append(take(other))
                at = time.monotonic()
                print(f"{at - start:.1f} s: the second process took {taken[0] / MIB:.0f} MiB", flush=True)
                run.wait(limit)
                seconds = time.monotonic() - at
        except subprocess.TimeoutExpired:
            print(f"HANGS: still running {limit:.0f} s after the memory was taken")
        finally:
            ended = run.poll()
            if ended is None:
                run.kill()
                run.wait()
    texts = [(scratch / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return Ended(ended, seconds, event, taken, *texts)


def read_json(path: Path) -> Any:
    """None for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def is_sentence(text: str) -> bool:
    return "\n" not in text and any(c.isdigit() for c in text)


def checked(ended: Ended, directory: Path, record: Any, *, fails: bool) -> dict[str, bool]:
    """fails: memory was taken, so the run has to fail in decode."""
    wanted = set(KEPT) if fails else {*KEPT, "load vae", "decode"}
    stages = {stage["name"] for stage in (record or {}).get("stages", ())}
    events = {event["name"] for event in read_json(directory / "memory_events.json") or ()}
    return {
        "the run reached denoising": ended.after_event is not None,
        "it ended within the limit": ended.exit_code is not None,
        f"its exit code is {int(fails)}": ended.exit_code == int(fails),
        "no traceback": "Traceback" not in ended.stdout + ended.stderr,
        "all files are there": all((directory / name).is_file() for name in FILES),
        "finished stages are kept": wanted <= stages,
        "their events are kept": wanted <= events,
        "stdout is the record": record is not None and record == _document(ended.stdout),
        **failure_checks(record, fails=fails),
    }


def failure_checks(record: Any, *, fails: bool) -> dict[str, bool]:
    if not fails:
        return {"nothing failed": record is not None and record["failure"] is None}
    failure = (record or {}).get("failure") or {}
    return {
        "out of memory in decode": (failure.get("kind"), failure.get("stage")) == ("oom", "decode"),
        "a sentence with numbers": is_sentence(failure.get("message", "")),
        "it says how much was asked for": bool(failure.get("requested_bytes")),
    }


def _document(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def result(ended: Ended, record: Any, checks: dict[str, bool], arguments: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "seconds", "peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes")
    return {
        "device": (record or {}).get("device"),
        "date": str(datetime.date.today()),
        "arguments": arguments,
        "memory_taken_after": ended.after_event,
        "taken_bytes": ended.taken,
        "exit_code": ended.exit_code,
        "seconds_from_taking_to_end": ended.seconds,
        "failure": (record or {}).get("failure"),
        "stderr": ended.stderr,
        "stages": [{key: stage[key] for key in keys} for stage in (record or {}).get("stages", ())],
        "checks": checks,
        "config": (record or {}).get("config"),
    }


def show(ended: Ended, record: Any, checks: dict[str, bool]) -> None:
    after = "" if ended.seconds is None else f", {ended.seconds:.1f} s after the memory was taken"
    print(f"exit code {ended.exit_code}{after}; taken in all: {sum(ended.taken) / MIB:.0f} MiB in {len(ended.taken)}")
    failure = (record or {}).get("failure")
    outcome = "there is none" if record is None else "nothing failed"
    if failure:
        outcome = f"{failure['kind']} in {failure['stage']}: {failure['message']}"
    print(f"record.json: {outcome}")
    print(f"stderr: {ended.stderr.strip()[-3000:] or '(empty)'}")
    stages = (record or {}).get("stages", ())
    print("stages in record.json:", ", ".join(s["name"] for s in stages) or "(no record)")
    for what, passed in checks.items():
        print(f"  {'ok  ' if passed else 'FAIL'} {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny weights, for --device cpu")
    parser.add_argument("--leave", type=int, default=600, metavar="MIB", help="what the second process leaves free")
    parser.add_argument("--once", action="store_true", help="the second process does not take what the run gives back")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="from the taking to the run's end")
    parser.add_argument("--gpu", default="h200", help="only names the file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    cpu = args.device == "cpu"
    if cpu and not args.tiny:
        parser.error("--device cpu needs --tiny")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "config.yaml").write_text(json.dumps(configuration(args.tiny)))
        command = [sys.executable, "-m", "wanvram", "profile", str(scratch / "config.yaml"), "--device", args.device]
        other = start_other(cpu, args.leave * MIB, args.once)
        try:
            ended = run_beside(other, [*command, "-o", str(scratch / "run"), "--json"], scratch, args.limit)
        finally:
            later = end_other(other)
        ended.taken.extend(later)
        record = read_json(scratch / "run" / "record.json")
        checks = checked(ended, scratch / "run", record, fails=not cpu)
    show(ended, record, checks)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    target = args.out / f"{datetime.date.today()}_{'cpu' if cpu else args.gpu}_other_process.json"
    target.write_text(json.dumps(result(ended, record, checks, arguments), indent=1) + "\n")
    print(f"wrote {target}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

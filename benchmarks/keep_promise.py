"""Does `wanvram generate --vram_budget` keep its promise? Random requests and budgets, typed as a person would, watched from outside.

    python benchmarks/keep_promise.py draw --seed 1 --count 20 --card_gib 80              prints the commands; no GPU
    python benchmarks/keep_promise.py run --seed 1 --count 20 --out a.json                on the GPU
    python benchmarks/keep_promise.py run --seed 1 --first 20 --count 20 --lanes 2 --out b.json     on two, a queue for both
    python benchmarks/keep_promise.py run --seed 1 --count 5 --budget_gib 1 1.9 --out small.json      budgets of which most are refused
    python benchmarks/keep_promise.py add a.json b.json -o benchmarks/2026-11-28_h100_keep_promise.json

Tasks take turns, each once in seven cases. Drawn: size, frames (4n+1 up to 81), a budget between 2 GiB and the card's memory
(log-uniform; --budget_gib gives another range), precision, prompt, pictures and videos of any aspect ratio. Requests are short:
frames are drawn again where arithmetic expects more than --limit GPU seconds (one case in eight: 15); rows and summary say which.

Every case is one `wanvram generate` that plans and runs, in a process of its own; nvml_watch.py, another process, polls the GPU.
A case is kept if the command ends with 0, the whole GPU's memory less what was used before stays within the budget, and the
predicted device memory is within 0.5 % of that and not more than 8 MiB under it. A budget that is too small has to end with exit
code 3 without touching the GPU, and to name one that does; one in five of those (the first, the sixth, ...) is then typed again
with the budget named. Exit code 1 if anything is broken, if fewer than --least cases ran, or, from --least 7, if a task did not.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nvml_watch import CONTEXT_BYTES, QUIET_BYTES, gpu_facts, gpu_of
from promise_requests import LIMIT_SECONDS, Case, draw, typed, write_media
from provenance import ResultFile, circumstances, conclude, environment_of_a_person, prediction_of, read_record

from wanvram.tasks import TASKS
from wanvram.units import parse_memory

__all__ = ["judge", "judge_case", "run_case"]

GIB = 2**30
MIB = 2**20
SCRIPTS = ("keep_promise.py", "promise_requests.py", "nvml_watch.py", "provenance.py")
MOST_ERROR = 0.005  # of predicted against measured device memory
MOST_UNDER_BYTES = 8 * MIB
RERUN_SHARE = 5  # one in so many refusals is typed again
TIMEOUT = 240.0  # seconds of one command
NAMED_BUDGET = re.compile(r"\bbudget\s+of\s+([0-9.,]+)\s+([GM]iB)")
Row = dict[str, Any]


# --- judging: pure, of what nvml_watch and the exit code said ----------------------------------------------------------------


def was_refused(row: Mapping[str, Any]) -> bool:
    """Exit code 3 before anything ran. With a record of a run the same code means that the run did not fit."""
    return row["watch"] is not None and row["watch"]["exit_code"] == 3 and not row["recorded"]


def judge_case(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """('kept', 'refused' or 'broken', every bound that was missed)."""
    watch = row["watch"]
    if watch is None:
        return "broken", [f"no report of the case: {row['trouble']}"]
    breaches = []
    apart = max(watch["before_spread_bytes"], watch["before_bytes"] - watch["after_bytes"])
    if apart > QUIET_BYTES:
        breaches.append(f"somebody else used the GPU: its memory before differs by {apart} bytes")
    refused = was_refused(row)
    breaches += _missed_by_refusal(row) if refused else _missed_by_run(row)
    return ("broken" if breaches else "refused" if refused else "kept"), breaches


def _missed_by_run(row: Mapping[str, Any]) -> list[str]:
    watch, breaches = row["watch"], []
    measured, predicted = watch["above_bytes"], row["predicted_device_bytes"]
    failed = watch["exit_code"] != 0 or row["failure"] is not None
    if failed:
        why = "killed after its time" if watch["timed_out"] else row["failure"] or watch["stderr_tail"][-300:]
        breaches.append(f"failed with exit code {watch['exit_code']}: {why}")
    if measured > row["budget_bytes"]:
        breaches.append(f"exceeds the budget by {measured - row['budget_bytes']} bytes")
    if failed:
        return breaches
    if predicted is None or measured <= 0:
        return [*breaches, "no prediction, or nothing measured"]
    if abs(predicted - measured) > MOST_ERROR * measured:
        breaches.append(f"predicted {predicted} of {measured} bytes: {predicted / measured - 1:+.3%}")
    if measured - predicted > MOST_UNDER_BYTES:
        breaches.append(f"predicted {measured - predicted} bytes too few")
    return breaches


def _missed_by_refusal(row: Mapping[str, Any]) -> list[str]:
    watch, breaches = row["watch"], []
    if row["rerun_of"] is not None:
        breaches.append("the budget that was named before is refused")
    if watch["above_bytes"] >= CONTEXT_BYTES:
        breaches.append(f"refused after the GPU was used: {watch['above_bytes']} bytes")
    if row["named_budget"] is None and "host RAM" not in watch["stderr_tail"]:
        breaches.append("the refusal names no budget")
    return breaches


def can_be_typed_again(row: Mapping[str, Any], card_bytes: int) -> bool:
    """A refused case whose named budget this card has."""
    return row["rerun_of"] is None and row["named_budget"] is not None and _bytes(row["named_budget"]) <= card_bytes


def judge(rows: Sequence[Row], card_bytes: int, least: int) -> dict[str, Any]:
    """Counts, ranges and all breaches; the series is fine if `breaches` is empty."""
    verdicts = [judge_case(row) for row in rows]
    ran = [row for row in rows if row["watch"] is not None and not was_refused(row)]
    refused = [row for row in rows if was_refused(row)]
    again = [row for row in rows if row["rerun_of"] is not None]
    named = [row for row in refused if can_be_typed_again(row, card_bytes)]
    breaches = [
        f"case {row['index']}: {text}" for row, (_, missed) in zip(rows, verdicts, strict=True) for text in missed
    ]
    first_ran = [row for row in ran if row["rerun_of"] is None]
    if len(first_ran) < least:
        breaches.append(f"{len(first_ran)} cases ran, at least {least} must")
    absent = sorted(set(TASKS) - {row["task"] for row in ran})
    if least >= len(TASKS) and absent:
        breaches.append(f"no case ran of {', '.join(absent)}")
    if len(again) * RERUN_SHARE < len(named):
        breaches.append(f"{len(again)} of {len(named)} refused cases were typed again")
    return {
        "cases": len(rows) - len(again),
        "ran": len(first_ran),
        "refused": len(refused),
        "typed_again": len(again),
        "kept": sum(verdict == "kept" for verdict, _ in verdicts),
        "exceeded": sum(row["watch"]["above_bytes"] > row["budget_bytes"] for row in ran),
        "failed": sum(row["watch"]["exit_code"] != 0 or row["failure"] is not None for row in ran),
        "died": sum(row["watch"] is None or row["watch"]["exit_code"] < 0 for row in rows),
        "shortened": sum(row["drawn_frames"] is not None for row in rows),
        "tasks": dict(sorted(Counter(row["task"] for row in first_ran).items())),
        "media": dict(sorted(Counter(media["flag"] for row in first_ran for media in row["media"]).items())),
        **_ranges(ran),
        "breaches": breaches,
    }  # fmt: skip


def _ranges(ran: Sequence[Row]) -> dict[str, Any]:
    """[lowest, highest] of predicted against measured device memory and of how much of the budget was used."""
    pairs = [
        (row["predicted_device_bytes"], row["watch"]["above_bytes"])
        for row in ran
        if row["predicted_device_bytes"] and row["watch"]["above_bytes"] > 0 and row["watch"]["exit_code"] == 0
    ]
    errors = [predicted / measured - 1 for predicted, measured in pairs]
    unders = [measured - predicted for predicted, measured in pairs]
    shares = [row["watch"]["above_bytes"] / row["budget_bytes"] for row in ran]
    before = [row["watch"]["first_use_seconds"] for row in ran if row["watch"]["first_use_seconds"]]
    names = ("error", "under_bytes", "share_of_budget", "seconds_before_the_gpu")
    return {
        name: [min(values), max(values)] if values else None
        for name, values in zip(names, (errors, unders, shares, before), strict=True)
    }


# --- one case ----------------------------------------------------------------------------------------------------------------


def run_case(
    case: Case, directory: Path, gpu: str | None, *, budget: str | None = None, words: Sequence[str] = ()
) -> Row:
    """Types the case's command in `directory`, where its media are, and returns its row. budget: named by a refusal of the
    case, which is typed again. words: more flags."""
    output = "run" if budget is None else "again"
    command = [*typed(case, output, budget), *words]
    env = environment_of_a_person(gpu)
    watch, trouble = _watched(command, directory, env)
    record = read_record(directory / output)
    row = _row(case, shlex.join(command), watch, trouble)
    if budget is not None:
        row |= {"rerun_of": case.index, "budget": budget, "budget_bytes": _bytes(budget)}
    if record is not None:
        row |= _recorded(record, directory, output, env)
    row["verdict"], row["breaches"] = judge_case(row)
    return row


def _row(case: Case, command: str, watch: dict[str, Any] | None, trouble: str) -> Row:
    """Of a command that left no record; what a record says comes on top."""
    return {
        **asdict(case),
        "rerun_of": None,
        "budget_bytes": case.budget_bytes,
        "command": command,
        "watch": watch,
        "trouble": trouble,
        "recorded": False,
        "predicted_device_bytes": None,
        "failure": None,
        "named_budget": _named_budget(watch),
    }


def _lost(case: Case, trouble: str) -> Row:
    row = _row(case, shlex.join(typed(case)), None, trouble)
    row["verdict"], row["breaches"] = judge_case(row)
    return row


def _watched(command: list[str], directory: Path, env: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    """(the watcher's report, what it said on stderr); the report is None if the watcher did not live to write it."""
    report = directory / "watch.json"
    report.unlink(missing_ok=True)
    watcher = [sys.executable, str(Path(__file__).with_name("nvml_watch.py")), "--out", str(report)]
    watcher += ["--cwd", str(directory), "--timeout", str(TIMEOUT), "--", sys.executable, "-m", *command]
    ended = subprocess.run(watcher, env=env, capture_output=True, text=True)
    try:
        watch = json.loads(report.read_text())
    except (OSError, ValueError):
        return None, f"the watcher ended with {ended.returncode}: {ended.stderr[-1000:]}"
    del watch["command"]  # the row has it as it is typed
    if watch["exit_code"] == 0:
        del watch["stdout_tail"]  # the summary of a run whose record is kept
    return watch, ended.stderr[-1000:]


def _recorded(record: dict[str, Any], directory: Path, output: str, env: dict[str, str]) -> Row:
    """What the program itself wrote about the run: its prediction is judged, the rest explains."""
    predicted, source = prediction_of(record), "record"
    if predicted.get("device_bytes") is None:
        predicted, source = _estimated(directory / output, record, directory, env), "estimate"
    config, failure = record["config"], record["failure"]
    environment = record["environment"]
    return {
        "recorded": True,
        "predicted_device_bytes": predicted.get("device_bytes"),
        "predicted_by": source,
        "predicted_seconds": predicted.get("seconds"),
        "failure": f"{failure['kind']}: {failure['message']}" if failure else None,
        "own_peak": record["peak"],
        "times": record.get("times"),
        "stages": {
            f"{number} {stage['name']}": {"seconds": stage["seconds"], "device_bytes": stage["peak_device_bytes"]}
            for number, stage in enumerate(record["stages"])
        },
        "own_budget_bytes": record["budget_bytes"],
        "strategy": config["model_config"] | config["optimization"],
        "allocator": {name: value for name, value in environment.items() if name.startswith("allocator")},
        "host": record["host"],
        "notes": record["notes"],
    }


def _estimated(run: Path, record: dict[str, Any], directory: Path, env: dict[str, str]) -> dict[str, Any]:
    """Predicted after the run, of the configuration that ran; for records that do not hold the prediction."""
    command = [sys.executable, "-m", "wanvram", "estimate", "--config", str(run / "config.yaml"), "--json"]
    if not record["config"]["request"].get("gpu"):
        from wanvram.simulate.gpus import find_gpu

        command += ["--gpu", find_gpu(record["device"].partition(":")[2]).key]
    ended = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
    try:
        return dict(json.loads(ended.stdout)["peak"])
    except (KeyError, ValueError):
        return {}


def _named_budget(watch: Mapping[str, Any] | None) -> str | None:
    found = NAMED_BUDGET.search(watch["stderr_tail"]) if watch and watch["exit_code"] == 3 else None
    return found.group(1).replace(",", "") + found.group(2) if found else None


def _bytes(budget: str) -> int:
    return parse_memory(budget)


# --- many cases --------------------------------------------------------------------------------------------------------------


class Series:
    """Cases from one queue for the lanes, each with a GPU of its own; every row is on the disk before the next case."""

    def __init__(self, args: argparse.Namespace, cases: list[Case], results: ResultFile, card_bytes: int) -> None:
        self._args = args
        self._results = results
        self._card_bytes = card_bytes
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._refused = 0
        self._cases: queue.SimpleQueue[Case] = queue.SimpleQueue()
        self.not_started = [case.index for case in cases]
        for case in cases:
            self._cases.put(case)

    def run(self, lanes: Sequence[str | None], directory: Path, media: Mapping[int, Future[None]]) -> None:
        threads = [threading.Thread(target=self._lane, args=(gpu, directory, media)) for gpu in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _lane(self, gpu: str | None, directory: Path, media: Mapping[int, Future[None]]) -> None:
        while time.monotonic() - self._start < self._args.seconds:
            try:
                case = self._cases.get_nowait()
            except queue.Empty:
                return
            with self._lock:
                self.not_started.remove(case.index)
            folder = directory / str(case.index)
            try:
                media[case.index].result()
                row = run_case(case, folder, gpu)
                self._keep(row)
                if self._wants_again(row):
                    self._keep(run_case(case, folder, gpu, budget=row["named_budget"]))
            except Exception as error:  # of the benchmark: the case is a row, and the others go on
                self._keep(_lost(case, f"{type(error).__name__}: {error}"))

    def _wants_again(self, row: Row) -> bool:
        """The first refusal and every fifth after it, of those whose named budget the card has."""
        if not was_refused(row) or not can_be_typed_again(row, self._card_bytes):
            return False
        with self._lock:
            self._refused += 1
            return self._refused % RERUN_SHARE == 1

    def _keep(self, row: Row) -> None:
        self._results.header["not_started"] = sorted(self.not_started)
        self._results.append(row)
        print(line_of(row), flush=True)


def line_of(row: Mapping[str, Any]) -> str:
    """`12 vace-14B 480*832 41 frames in 5.3GiB: NVML 5210, predicted 5217 MiB (+0.13 %) kept`."""
    again = "" if row["rerun_of"] is None else " again"
    frames = "" if row["frames"] is None else f" {row['frames']} frames"
    text = f"{row['index']}{again} {row['task']} {row['size']}{frames} in {row['budget']}: "
    watch, predicted = row["watch"], row["predicted_device_bytes"]
    if watch is not None:
        text += f"NVML {watch['above_bytes'] / MIB:.1f}"
        if predicted and watch["above_bytes"] > 0:
            text += f", predicted {predicted / MIB:.1f} MiB ({predicted / watch['above_bytes'] - 1:+.2%})"
        text += f", {watch['seconds']:.1f} s, GPU after {watch['first_use_seconds'] or 0:.1f} s, "
    if row["named_budget"]:
        text += f"names {row['named_budget']}, "
    return text + str(row["verdict"]) + "".join(f"; {breach}" for breach in row["breaches"])


def lanes_of(count: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each lane; one lane leaves the variable alone."""
    if count == 1:
        return [None]
    seen = environment_of_a_person().get("CUDA_VISIBLE_DEVICES")
    gpus = [entry.strip() for entry in seen.split(",")] if seen else [str(number) for number in range(count)]
    if len(gpus) < count:
        raise SystemExit(f"--lanes {count}: CUDA_VISIBLE_DEVICES={seen} shows {len(gpus)} GPUs")
    return list(gpus[:count])


def run(args: argparse.Namespace) -> int:
    import pynvml

    pynvml.nvmlInit()
    lanes = lanes_of(args.lanes)
    cards = [gpu_of(pynvml, environment_of_a_person(gpu).get("CUDA_VISIBLE_DEVICES")) for gpu in lanes]
    facts = [gpu_facts(pynvml, card) for card in cards]
    card_bytes = min(fact["total_bytes"] for fact in facts)
    cases = drawn(args, card_bytes)
    header = {
        "benchmark": "keep_promise",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **circumstances(*SCRIPTS),
        "seed": args.seed,
        "calls": [{"first": args.first, "count": args.count, "seconds": args.seconds}],
        "lanes": args.lanes,
        "limit_seconds": args.limit,
        "budget_gib": args.budget_gib,
        "card": facts[0]["name"],
        "card_bytes": card_bytes,
        "driver": facts[0]["driver"],
        "gpus_before": facts,
        "not_started": [case.index for case in cases],
    }
    results = ResultFile(args.out, header, lambda rows: judge(rows, card_bytes, args.least))
    series = Series(args, cases, results, card_bytes)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as writer:
        media = {case.index: writer.submit(_prepare, case, Path(name) / str(case.index)) for case in cases}
        try:
            series.run(lanes, Path(name), media)
        finally:
            writer.shutdown(cancel_futures=True)
    results.header["gpus_after"] = [gpu_facts(pynvml, card) for card in cards]
    results.header["not_started"] = sorted(series.not_started)
    results.write()
    return conclude(judge(results.rows, card_bytes, args.least))


def _prepare(case: Case, directory: Path) -> None:
    directory.mkdir()
    write_media(case, directory)


def add(args: argparse.Namespace) -> int:
    """One document of several calls; everything that must be the same is."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    same = (
        "benchmark",
        "seed",
        "source_sha256",
        "limit_seconds",
        "budget_gib",
        "card",
        "card_bytes",
        "driver",
        "torch",
    )
    for key in same:
        values = {json.dumps(document.get(key)) for document in documents}
        if len(values) > 1:
            raise SystemExit(f"these calls cannot be added up: {key} is {' and '.join(sorted(values))}")
    rows = [row for document in documents for row in document["rows"]]
    counts = Counter(row["index"] for row in rows if row["rerun_of"] is None)
    calls = [call for document in documents for call in document["calls"]]
    header = {key: value for key, value in documents[0].items() if key not in ("rows", "summary", "calls")}
    header |= {
        "note": f"{len(documents)} calls of one seed and one code added up, every row of each: {', '.join(p.name for p in args.files)}",
        "calls": calls,
        "each_call": [
            {k: d[k] for k in ("started", "commit", "gpus_before", "gpus_after") if k in d} for d in documents
        ],
        "not_started": sorted({i for d in documents for i in d["not_started"]} - set(counts)),
        "run_more_than_once": sorted(index for index, count in counts.items() if count > 1),
    }
    card_bytes = header["card_bytes"]
    results = ResultFile(args.out, header, lambda rows: judge(rows, card_bytes, args.least))
    results.rows = rows
    results.write()
    return conclude(judge(rows, card_bytes, args.least))


def drawn(args: argparse.Namespace, card_bytes: int) -> list[Case]:
    numbers = range(args.first, args.first + args.count)
    return [draw(args.seed, number, card_bytes, args.limit, args.budget_gib) for number in numbers]


def show(args: argparse.Namespace) -> int:
    for case in drawn(args, int(args.card_gib * GIB)):
        print(f"# {case.index}: {case.expected_seconds:.1f} s expected" + (
            "" if case.drawn_frames is None else f", drawn with {case.drawn_frames} frames"))  # fmt: skip
        print(shlex.join(typed(case)))
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = result.add_subparsers(dest="verb", required=True)
    for name, function in (("draw", show), ("run", run)):
        verb = verbs.add_parser(name)
        verb.set_defaults(function=function)
        verb.add_argument("--seed", type=int, required=True)
        verb.add_argument("--first", type=int, default=0, help="number of the first case")
        verb.add_argument("--count", type=int, default=20)
        verb.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="expected GPU seconds of a case at most")
        verb.add_argument(
            "--budget_gib",
            type=float,
            nargs=2,
            metavar=("LOW", "HIGH"),
            help="lowest and highest budget in GiB (default: 2 and the card's memory)",
        )
    verbs.choices["draw"].add_argument("--card_gib", type=float, required=True, help="memory of the card")
    verb = verbs.choices["run"]
    verb.add_argument("--seconds", type=float, default=1e9, help="start no further case after this many seconds")
    verb.add_argument("--lanes", type=int, default=1, help="GPUs side by side")
    verb.add_argument("--least", type=int, default=1, help="cases that must run")
    verb.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    verb = verbs.add_parser("add")
    verb.set_defaults(function=add)
    verb.add_argument("files", type=Path, nargs="+")
    verb.add_argument("--least", type=int, default=40, help="cases that must have run")
    verb.add_argument("-o", "--out", type=Path, required=True)
    return result


def main() -> int:
    args = parser().parse_args()
    return int(args.function(args))


if __name__ == "__main__":
    sys.exit(main())

"""Is what was measured still predicted? Every committed measurement that has a prediction, predicted anew with today's code.

    make evidence                              all of them, on all cores, 11 minutes of one core, no GPU; beside known_misses.json
    make evidence ARGS=--quick                 the seals, and one case of each of a kind's newest files: what CI runs
    make evidence ARGS="--only keep_promise"   files whose name contains this
    make evidence ARGS=--record                known_misses.json becomes what missed today, of the runs that --only or --quick leave
    python benchmarks/evidence.py --seal       adds new result files to seals.json; see sealed.py for files that changed

A figure is missed: allocated or reserved memory of a stage that is not equal to the byte, device memory off by over 3 %
(0.5 % or 8 MiB too low where NVML watched from outside), a steady step by over 7 %, a decode by over 10 %, a whole command by over
15 %. Exit code 1: a miss that known_misses.json does not name, one that grew, one named that is no more, or a broken seal.
Not predicted anew, and counted: commands that read a checkpoint or compiled kernels for the first time, whose time is that machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import foreign_predict
import predict_promise_again
import sealed
import several_gpus
from attention_backends import CASES as ATTENTION_CASES
from PIL import Image
from provenance import attended

from wanvram.cli.flags import config_from_flags
from wanvram.cli.main import build_parser
from wanvram.cli.processes import for_all
from wanvram.config import RunConfig
from wanvram.predict.simulate import simulate, simulate_rank
from wanvram.record import RunRecord

HERE = Path(__file__).parent
KNOWN = HERE / "known_misses.json"
MIB = 2**20
BOUNDS = {"allocated_bytes": 0.0, "reserved_bytes": 0.0, "device_bytes": 0.03, "step_seconds": 0.07,
          "decode_seconds": 0.10, "command_seconds": 0.15}  # fmt: skip
WATCHED, MOST_UNDER_BYTES = 0.005, 8 * MIB  # of NVML's figure, from another process
GROWN = 1.05  # times its recorded error: then a known miss is a new one
QUICK_EACH = 4  # files of a kind: a minute on two cores, and CI has 25 minutes for everything
# Of pictures that were not kept; only their proportions matter to memory and time.
PROPORTIONS = {"tall.png": (720, 1280), "first.png": (768, 1024), "last.png": (768, 1024)}
Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One measured run. predict: its figures today; only those that were measured, too, are compared."""

    file: str
    name: str
    measured: Figures
    predict: Callable[[], Figures]

    @property
    def key(self) -> str:
        """The same for runs of one configuration, which are predicted once."""
        return repr(self.predict)

    def misses(self, predicted: Figures) -> list[dict[str, Any]]:
        rows = []
        for figure, value in self.measured.items():
            found = predicted.get(figure)
            error = None if found is None else (found - value) / value if value else found - value
            if missed(figure, found, value):
                row = {"file": self.file, "case": self.name, "figure": figure, "measured": value, "predicted": found}
                rows.append(row | {"error": None if error is None else round(error, 6)})
        return rows


def missed(figure: str, predicted: float | None, measured: float) -> bool:
    if predicted is None:
        return True
    if figure == "watched device_bytes":
        return abs(predicted - measured) > WATCHED * measured or measured - predicted > MOST_UNDER_BYTES
    return abs(predicted - measured) > BOUNDS[figure.rsplit(" ", 1)[-1]] * measured


# --- what a simulated run says ----------------------------------------------------------------------------------------------


def numbered(names: list[str]) -> list[str]:
    """A name that comes again gets its number: `load vae`, `load vae 2`."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return result


def figures(record: RunRecord) -> Figures:
    if record.failure is not None:
        return {}
    found: Figures = {}
    for name, stage in zip(numbered([s.name for s in record.stages]), record.stages, strict=True):
        found[f"{name} allocated_bytes"] = stage.peak.allocated_bytes
        found[f"{name} reserved_bytes"] = stage.peak.reserved_bytes
    peak = record.peak()
    if peak is not None:
        found |= {"allocated_bytes": peak.allocated_bytes, "reserved_bytes": peak.reserved_bytes}
        found |= {"device_bytes": peak.device_bytes or 0}
    times = {
        "step_seconds": record.step_seconds(),
        "decode_seconds": sum(s.seconds or 0.0 for s in record.stages if s.part == "decode"),
        "command_seconds": record.times.in_all_seconds,
    }
    return found | {name: value for name, value in times.items() if value}


def of_config(config: dict[str, Any], card: str, *, video: bool = False, limit_bytes: int | None = None) -> Figures:
    """config: of a record or of a YAML. limit_bytes: the cap it ran under, which is no part of that."""
    asked = json.loads(json.dumps(config))
    with tempfile.TemporaryDirectory() as folder:
        for key in ("image", "first_frame", "last_frame"):
            if asked["request"].get(key):
                name = Path(asked["request"][key]).name
                asked["request"][key] = f"{folder}/{name}"
                Image.new("RGB", PROPORTIONS.get(name, (1280, 720))).save(asked["request"][key])
        run = replace(RunConfig.from_dict(asked), device="simulated", gpu=card)
        run = run if limit_bytes is None else replace(run, memory_limit_bytes=limit_bytes)
        return figures(simulate(run, video=video)[0])


def of_command(row: dict[str, Any], card: str) -> Figures:
    """A command as it was typed, with the strategy that ran."""
    words = shlex.split(row["command"])
    with tempfile.TemporaryDirectory() as name:
        here = Path.cwd()
        os.chdir(name)
        try:
            args = build_parser().parse_args(words[1:])
            config = config_from_flags(args, device="simulated", weights="random", gpu=card, memory_limit_bytes=None)
            strategy = {key: value for key, value in (row["strategy"] or {}).items() if hasattr(config.strategy, key)}
            return figures(simulate(replace(config, strategy=replace(config.strategy, **strategy)), video=True)[0])
        finally:
            os.chdir(here)


# --- files ------------------------------------------------------------------------------------------------------------------


def stages_of(rows: list[dict[str, Any]]) -> Figures:
    """Rows with `stage` and, for each quantity, what was measured; of device memory the highest."""
    found: Figures = {}
    for name, row in zip(numbered([row["stage"] for row in rows]), rows, strict=True):
        for quantity in ("allocated", "reserved"):
            if row.get(quantity, {}).get("measured") is not None:
                found[f"{name} {quantity}_bytes"] = row[quantity]["measured"]
    highest = max((row.get("device", {}).get("measured") or 0 for row in rows), default=0)
    return found | ({"device_bytes": highest} if highest else {})


def of_peaks(file: str, document: list[dict[str, Any]], card: str) -> Iterator[Case]:
    """predict_vs_measure.py. What was called device then is the process's own figure."""
    for run in document:
        if run["rows"]:
            config = attended(run["configuration"], run.get("attention"))  # recorded since 2026-11-30
            yield Case(file, run["config"], stages_of(run["rows"]), partial(of_config, config, card))


def of_fit_card(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """The whole GPU's peak, by NVML; steps that read from disk are that disk's. The first case of a call compiles kernels in its decode."""
    for number, case in enumerate(document["cases"]):
        if "error" in case:
            continue
        measured = stages_of(case["stages"]) | {"device_bytes": case["nvml_peak_bytes"]}
        if case["config"]["optimization"].get("weights_in") != "disk" and case["step_seconds"]:
            measured["step_seconds"] = case["step_seconds"]
        config, limit = case["config"], None
        if "attention" in case:  # since 2026-11-29; the code before did not take what a cap makes a run take first
            limit = case["limit_bytes"]
            decode = sum(stage["seconds"] for stage in case["stages"] if stage["stage"] == "decode")
            measured |= {"decode_seconds": decode} if number and decode else {}
            config = attended(config, case["attention"])
        yield Case(file, case["name"], measured, partial(of_config, config, card, limit_bytes=limit))


def of_promise(file: str, document: dict[str, Any], _card: str) -> Iterator[Case]:
    for row in document["rows"]:
        if row["recorded"]:
            name = f"{row['index']} {row['task']} {row['size']} {row['frames']} frames" + (
                "" if row["rerun_of"] is None else ", typed again"
            )
            peak = {f"{q}_bytes": row["own_peak"][f"{q}_bytes"] for q in ("allocated", "reserved")}
            measured = peak | {"watched device_bytes": row["watch"]["above_bytes"]}
            yield Case(file, name, measured, partial(promised, row, document))


def promised(row: dict[str, Any], document: dict[str, Any]) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        found = predict_promise_again.predict(row, document, Path(name))
    return {
        "watched device_bytes": found["predicted_bytes"],
        "reserved_bytes": found["reserved"][0],
        "allocated_bytes": found["allocated"][0],
    }


def of_old_promise(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """Of 2026-11-24: NVML's figure of the whole GPU, from the process that ran."""
    for case in document["cases"]:
        measured = {f"{q}_bytes": case["measured"][f"{q}_bytes"] for q in ("allocated", "reserved")}
        measured |= {"device_bytes": case["nvml_bytes"]}
        yield Case(file, case["name"], measured, partial(of_config, case["config"], card, video=True))


def of_wall_clock(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """Whole commands, warm, with random weights, without a plan before them: planning takes as long as the machine that plans."""
    for row in document["rows"]:
        if "--vram_budget" in row["command"]:
            continue
        if not row["cold"] and row["pages_in_ram"] is None and row["exit_code"] == 0:
            yield Case(file, f"{row['name']} warm", {"command_seconds": row["seconds"]}, partial(of_command, row, card))


def of_batches(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    for row in document["rows"]:
        measured = stages_of(row["stages"]) | {"step_seconds": row["steps"]["measured"]}
        config = document["predicted"][row["name"]]["config"]
        yield Case(file, row["name"], measured, partial(of_config, config, card, video=True))


def of_attention(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """Each run's differences from what was predicted then give back what was measured."""
    then = {(row["part"], row["backend"]): row for row in document["rows"] if row["kind"] == "predicted"}
    configs = {case.name: case for case in ATTENTION_CASES}
    runs: Counter[tuple[str, str]] = Counter()
    for row in document["rows"]:
        key = row["part"], row.get("backend", "")
        if row["kind"] != "run" or row["failure"] is not None or key not in then:
            continue
        runs[key] += 1
        measured: Figures = {"step_seconds": row["step_seconds"], "device_bytes": row["device_bytes"]}
        for stage in row["stages"]:
            for place, quantity in enumerate(("allocated", "reserved")):
                peak = then[key]["peaks"][stage["stage"]][place]
                measured[f"{stage['stage']} {quantity}_bytes"] = peak - stage[quantity]
        name = f"{row['part']} {row['backend']} {runs[key]}"
        yield Case(file, name, measured, partial(of_config, configs[row["part"]].config(row["backend"]), card))


def of_run(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """record.json of a run. Its first decode also loads libraries, so that its time is not judged."""
    measured = figures(RunRecord.from_json(document))
    left_out = ("command_seconds", "decode_seconds")
    measured = {k: v for k, v in measured.items() if k not in left_out and not k.endswith(" device_bytes")}
    yield Case(file, document["config"]["name"], measured, partial(of_config, document["config"], card, video=True))


def of_whole_run(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """A run from a checkpoint, with the prediction that the command had made itself: planning and reading are that machine's."""
    yield from of_run(file, document["record"], card)


def of_ranks(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """Each process of runs on several GPUs, and of one on one."""
    for row in document["rows"]:
        sizes = row["sizes"]
        name = f"{' '.join(f'{key}={n}' for key, n in sizes.items()) or 'alone'} rank {row['rank']}"
        config = document["config"] | {"optimization": document["config"]["optimization"] | sizes}
        yield Case(file, name, stages_of(row["stages"]), partial(of_rank, config, card, row["rank"]))


def of_rank(config: dict[str, Any], card: str, rank: int) -> Figures:
    run = replace(RunConfig.from_dict(config), device="simulated", gpu=card)
    return figures(simulate_rank(run, rank, video=True)[0])


def of_layouts(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """Each GPU of several_gpus.py's runs, by NVML; steps of the run."""
    for row in document["rows"]:
        if row["figure"] != "layout":
            continue
        for rank in range(row["gpus"]):
            measured = {"device_bytes": row["above_bytes"][rank]}
            measured |= {} if rank else {"step_seconds": row["step_seconds"]}
            name = f"{row['case']} {row['way']} rank {rank}, call {row['call']}"
            words = several_gpus.words_of(row["case"], several_gpus.ways(max(2, row["gpus"]))[row["way"]])
            yield Case(file, name, measured, partial(of_rank_of, tuple(words), card, rank))


def of_rank_of(words: tuple[str, ...], card: str, rank: int) -> Figures:
    asked = build_parser().parse_args(words)
    config = for_all(config_from_flags(asked, device="simulated", weights="random", gpu=card, memory_limit_bytes=None))
    return figures(simulate_rank(config, rank, video=True)[0])


def of_advice(file: str, document: Any, card: str) -> Iterator[Case]:
    for row in document if isinstance(document, list) else document["rows"]:
        if "error" in row:
            continue
        for when, peak in zip(("before", "after"), row["peaks"], strict=True):
            measured = {f"{q}_bytes": peak[f"{q}_bytes"] for q in ("allocated", "reserved", "device")}
            measured = {name: value for name, value in measured.items() if value}
            name = f"{row['name']} {when} {row['change']}"
            yield Case(file, name, measured, partial(of_config, row[when], card))


def of_foreign(file: str, document: dict[str, Any], card: str) -> Iterator[Case]:
    """Other people's code by its own judgement: 0.1 % and 1 %, or inside the range that is stated."""
    for name, row in document["cases"].items():
        if "error" not in row:
            yield Case(file, name, {"foreign verdict allocated_bytes": 1.0}, partial(foreign, name, row, card))


def foreign(name: str, measured: dict[str, Any], card: str) -> Figures:
    """1 where it is right; else 1 + its error."""
    found = foreign_predict.in_process(name, card)
    if "error" in found:
        return {}
    verdict = foreign_predict.verdict(found, measured)
    errors = (found[k] / measured[k] - 1 for k in ("allocated_bytes", "reserved_bytes"))
    return {"foreign verdict allocated_bytes": 1.0 if verdict != "MISSED" else 1.0 + max(errors, key=abs)}


KINDS: dict[str, Callable[[str, Any, str], Iterator[Case]]] = {
    "*_predict_vs_measure.json": of_peaks,
    "*_matrix.json": of_peaks,
    "*_convolutions.json": of_peaks,
    "*_fit_card.json": of_fit_card,
    "*_fit_card_disk.json": of_fit_card,
    "2026-11-24_*_keep_promise.json": of_old_promise,
    "*_keep_promise*.json": of_promise,
    "*_wall_clock*.json": of_wall_clock,
    "*_batches.json": of_batches,
    "*_attention_backends.json": of_attention,
    "*_attention_pairs*.json": of_attention,
    "*_generate_720P_fa4.json": of_run,
    "*_whole_run_*.json": of_whole_run,
    "*_two_ranks_one_gpu.json": of_ranks,
    "*_several_gpus.json": of_layouts,
    "*_advice_saving.json": of_advice,
    "*_foreign_measured*.json": of_foreign,
}


def cases(only: str = "") -> list[Case]:
    found: dict[str, list[Case]] = {}
    for pattern, kind in KINDS.items():
        for path in sorted(HERE.glob(pattern)):
            if only in path.name and path.name not in found:
                if not path.stat().st_size:
                    raise SystemExit(f"{path} is empty: its benchmark still runs, or was killed; then delete it")
                document = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(document, dict) and document.get("benchmark") == "predict_promise_again":
                    continue
                card = path.name.split("_")[1]
                found[path.name] = list(kind(path.name, document, card))
    return [case for name in sorted(found) for case in found[name]]


def quick(all_cases: list[Case]) -> list[Case]:
    """The first of each of the newest files of each kind that are no process of their own."""
    first = {case.file: case for case in reversed(all_cases) if "_foreign_" not in case.file}
    newest = {name for pattern in KINDS for name in sorted(n for n in first if Path(n).match(pattern))[-QUICK_EACH:]}
    return [first[name] for name in sorted(newest)]


# --- judgement --------------------------------------------------------------------------------------------------------------


def key_of(miss: dict[str, Any]) -> tuple[str, str, str]:
    return miss["file"], miss["case"], miss["figure"]


def judged(found: list[dict[str, Any]], known: list[dict[str, Any]], looked_at: set[tuple[str, str]]) -> list[str]:
    """Sentences; none where today's misses are those that are known."""
    before = {key_of(miss): miss for miss in known}
    today = {key_of(miss): miss for miss in found}
    breaches = []
    for key, miss in today.items():
        if key not in before:
            breaches.append(f"a miss that is not in known_misses.json: {told(miss)}")
        elif (before[key]["error"] is None) != (miss["error"] is None) or (
            miss["error"] is not None and abs(miss["error"]) > abs(before[key]["error"]) * GROWN + 1e-6
        ):
            breaches.append(f"a known miss that grew from {before[key]['error']}: {told(miss)}")
    gone = [key for key in before if key not in today and key[:2] in looked_at]
    return breaches + [
        f"known and no longer missed (--record takes it off the list): {' | '.join(key)}" for key in gone
    ]


def told(miss: dict[str, Any]) -> str:
    error = "not predicted" if miss["error"] is None else f"{miss['error']:+.3%}"
    return f"{miss['file']} | {miss['case']} | {miss['figure']}: measured {miss['measured']:g}, {error}"


def predicted(case: Case) -> Figures:
    """Nothing, with the reason on stderr, where today's code refuses the run."""
    try:
        return case.predict()
    except Exception as error:  # one case that cannot be predicted must not cost the others
        print(f"{case.file} {case.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return {}


Looked = set[tuple[str, str]]


def run(chosen: list[Case], lanes: int, keep: Callable[[list[dict[str, Any]], Looked], None]) -> list[dict[str, Any]]:
    """The misses of all; keep hears of them after every run, so that what was found is not lost with the process."""
    found: list[dict[str, Any]] = []
    looked_at: Looked = set()
    with ProcessPoolExecutor(lanes) as pool:
        once = {case.key: pool.submit(predicted, case) for case in {case.key: case for case in chosen}.values()}
        for case in chosen:
            misses = case.misses(once[case.key].result())
            found += misses
            looked_at.add((case.file, case.name))
            keep(found, looked_at)
            print(
                f"{len(case.measured) - len(misses):3d} of {len(case.measured):3d}  {case.file}  {case.name}",
                flush=True,
            )
    return found


def record(known: dict[str, Any], found: list[dict[str, Any]], looked_at: Looked) -> None:
    """known_misses.json with today's misses of the runs that were looked at."""
    others = [miss for miss in known["misses"] if key_of(miss)[:2] not in looked_at]
    misses = sorted([*others, *found], key=key_of)
    KNOWN.write_text(json.dumps(known | {"misses": misses}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--seal", nargs="*", metavar="FILE", help="new files; a named one again, with --because")
    parser.add_argument("--because", default="", help="why a sealed file changed; kept in seals.json")
    parser.add_argument("--lanes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a GPU here would bring its machine's speed into the predictions
    if args.seal is not None:
        return sealed.seal(HERE, args.seal, args.because)
    known = json.loads(
        KNOWN.read_text(encoding="utf-8")
    )  # reasons: by file, written by hand; misses: as --record found them
    start, everything = time.monotonic(), cases(args.only)
    chosen = quick(everything) if args.quick else everything
    found = run(chosen, args.lanes, partial(record, known) if args.record else lambda *_: None)
    count = sum(len(case.measured) for case in chosen)
    print(
        f"{count - len(found)} of {count} figures of {len(chosen)} runs as predicted, {time.monotonic() - start:.0f} s"
    )
    if args.record:
        return sealed.seal(HERE, [KNOWN.name], args.because or "predicted anew")
    breaches = judged(found, known["misses"], {(case.file, case.name) for case in chosen})
    breaches += sealed.broken(HERE)
    for breach in breaches:
        print(f"BROKEN {breach}")
    for name in sealed.unsealed(HERE):
        print(f"not sealed yet: {name}")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())

"""Which changes of the code would no test notice? A seeded sample of single changes, each run against the tests closest to it.

    make mutants ARGS="--count 20 --seed 1 --out mutants.json"      about a quarter of a minute a mutant on one core; outside CI, needs fork
    make mutants ARGS="--list --seed 1 --count 200"                 the sample, without running anything
    make mutants ARGS="--only src/wanvram/record.py:213:18"         one again
    make mutants ARGS="--wide --lanes 16"                           what lives is also tried on all of unit/ and parity/: minutes each

A change is one flipped comparison, one arithmetic or logical operator, one number, one boolean, one inverted condition, or one
statement that is left out, in a copy of the source. First the tests run without a change: what fails then is left out. Killed: a test
failed, or took longer than --seconds. Whether a survivor matters is for a person to say: many are equivalent, and the file has a `reason`
for each to be filled in; --judge FILE counts.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = Path("src/wanvram")
LEAST_KILLED = 0.85  # of those that matter
REPORT = "test_answer_facts test_markdown_report test_html_report test_terminal_report"
# The modules of which a user or a record sees the figures, and the test files closest to each, the quickest first.
TESTS = {
    "analysis/compare.py": "test_compare test_reading_facts",
    "analysis/peak.py": "test_stage_facts test_analysis test_reading_facts test_analyze_command",
    "analysis/replay.py": "test_snapshot_facts test_snapshot_reader test_memory_viz",
    "analysis/snapshot.py": "test_snapshot_facts test_snapshot_reader test_memory_viz test_field_files",
    "analysis/stages.py": "test_stage_facts test_analysis test_reading_facts test_analyze_command",
    "analysis/trace.py": "test_trace_facts test_trace_reader test_reading_facts test_field_files",
    "analysis/trace_summary.py": "test_trace_facts test_trace_reader test_reading_facts test_field_files",
    "cli/budget.py": "test_flag_facts test_budget_flags test_plan_command",
    "cli/flags.py": "test_flag_facts test_machine_facts test_knobs test_plan_command",
    "config.py": "test_request_facts test_config test_knobs",
    "engine/components.py": "test_engine_facts test_component_forecasts test_machine_facts integration/test_strategies",
    "engine/pipeline.py": "test_run_facts test_record_facts test_libraries integration/test_resume integration/test_batches",
    "engine/residency.py": "test_engine_facts test_residency test_residency_order test_machine_facts test_weight_facts test_packing",
    "engine/streaming.py": "test_streaming test_engine_facts test_residency test_residency_order",
    "engine/vae_stages.py": "test_model_facts test_picture_facts test_ferry",
    "machine/checks.py": "test_check test_machine_facts",
    "models/conditioning.py": "test_model_facts test_picture_facts parity/test_conditioning",
    "models/dit_blocks.py": "test_model_facts test_picture_facts parity/test_dit",
    "models/rotary.py": "test_model_facts test_picture_facts parity/test_dit",
    "models/vae_tiles.py": "test_model_facts test_vae_tiles",
    "planner/budget.py": "test_planner_places test_planner_words test_planner",
    "planner/forecasts.py": "test_planner_places test_planner_choices test_planner_words test_planner",
    "planner/placement.py": "test_planner_places test_planner test_planner_stream",
    "planner/refusal.py": "test_planner_words test_planner",
    "planner/result.py": "test_planner_words test_planner test_plan_command",
    "planner/search.py": "test_planner_words test_planner test_plan_command",
    "planner/tiles.py": "test_planner_choices test_planner",
    "planner/transformer.py": "test_planner_choices test_planner test_planner_stream",
    "predict/advice.py": "test_advice_facts test_advice",
    "predict/plan.py": "test_plan_facts test_plan_command",
    "predict/stage.py": "test_component_forecasts test_forecast",
    "record.py": "test_stage_facts test_record test_record_facts test_damaged_runs",
    "recorder/events.py": "test_recorder_facts test_event_log test_recorder test_profiler",
    "recorder/meters.py": "test_recorder_facts test_recorder test_cuda_meter test_profiler",
    "recorder/recorder.py": "test_recorder_facts test_recorder test_record_facts test_interrupts",
    "report/findings.py": f"{REPORT} test_reading_facts",
    "report/markdown.py": "test_answer_facts test_markdown_report test_gpu_reports",
    "report/terminal.py": "test_answer_facts test_gpu_reports test_terminal_report test_reading_facts",
    "request.py": "test_request_facts test_config test_tasks",
    "run/execute.py": "test_run_facts test_record_facts integration/test_ended_early",
    "simulate/allocator.py": "test_simulation_facts test_allocator test_reading_facts",
    "simulate/clock.py": "test_clock_facts test_clock test_reading_facts test_times test_wall_clock",
    "simulate/libraries.py": "test_simulation_facts test_libraries test_convolutions test_simulated_memory test_attention_choice",
    "simulate/memory.py": "test_simulation_facts test_simulated_memory test_timeline test_libraries test_clock",
    "simulate/timeline.py": "test_simulation_facts test_timeline test_reading_facts test_memory_viz",
    "spans.py": "test_stage_facts test_record test_record_facts test_analysis",
    "units.py": "test_units",
    "weights/convert.py": "test_checkpoint_facts test_convert test_weight_facts",
    "weights/diffusers.py": "test_checkpoint_facts test_checkpoint_layouts test_weight_facts test_recognise",
    "weights/official.py": "test_checkpoint_facts test_checkpoint_layouts test_recognise test_weights",
    "weights/sources.py": "test_checkpoint_facts test_weights test_hostile_weights test_weight_facts",
}
_COMPARED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is",
             "in": "not in", "not in": "in"}  # fmt: skip
_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
          ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*",
          ast.FloorDiv: "//", ast.Div: "/", ast.Mod: "%", ast.And: "and", ast.Or: "or"}  # fmt: skip
_ARITHMETIC = {"+": "-", "-": "+", "*": "//", "//": "*", "/": "*", "%": "//"}


@dataclass(frozen=True)
class Mutant:
    """One change: the text `old` at line:column (from 1, in characters of the line's bytes) becomes `new`."""

    file: str
    line: int
    column: int
    start: int  # bytes in the file
    old: str
    new: str

    @property
    def place(self) -> str:
        return f"{SOURCE}/{self.file}:{self.line}:{self.column}"

    def applied(self, data: bytes) -> bytes:
        old = self.old.encode()
        assert data[self.start : self.start + len(old)] == old, self.place
        return data[: self.start] + self.new.encode() + data[self.start + len(old) :]


class _Finder(ast.NodeVisitor):
    """All changes of one file. Not inside annotations, decorators, messages of errors, and assertions."""

    def __init__(self, file: str, data: bytes) -> None:
        self.file, self.data = file, data
        self.lines = [0]
        for line in data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.found: list[Mutant] = []

    def span(self, node: Any) -> tuple[int, int]:
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def add(self, start: int, end: int, new: str) -> None:
        line = self.data.count(b"\n", 0, start) + 1
        old = self.data[start:end].decode()
        self.found.append(Mutant(self.file, line, start - self.lines[line - 1] + 1, start, old, new))

    def between(self, left: ast.AST, right: ast.AST, sign: str, new: str) -> None:
        """The operator between two operands; parentheses and comments may stand there, too."""
        low, high = self.span(left)[1], self.span(right)[0]
        at = self.data.find(sign.encode(), low, high)
        if at >= 0:
            self.add(at, at + len(sign), new)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_Raise(self, node: ast.Raise) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add(*self.span(node), "pass")
            self.generic_visit(node)
        elif not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(*self.span(node), "pass")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.inverted(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.inverted(node.test)
        self.generic_visit(node)

    def inverted(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare):  # whose operator is flipped
            start, end = self.span(test)
            self.add(start, end, f"(not ({self.data[start:end].decode()}))")

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right, operator in zip(operands, operands[1:], node.ops, strict=False):
            sign = _SIGNS[type(operator)]
            self.between(left, right, sign, _COMPARED[sign])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        sign = _SIGNS[type(node.op)]
        if len(node.values) == 2:
            self.between(*node.values, sign, "or" if sign == "and" else "and")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        sign = _SIGNS.get(type(node.op))
        texts = any(isinstance(n, (ast.JoinedStr, ast.List, ast.Tuple)) or _is_text(n) for n in (node.left, node.right))
        if sign in _ARITHMETIC and not texts:
            self.between(node.left, node.right, sign, _ARITHMETIC[sign])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            self.add(*self.span(node.func), "max" if node.func.id == "min" else "min")
        elif isinstance(node.func, ast.Name) and node.func.id == "require":
            self.visit(node.args[0])  # the other is a message
            return
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip, whose two sides are of one length
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add(*self.span(node), str(not value))
        elif isinstance(value, int):
            self.add(*self.span(node), str(value + 1))
        elif isinstance(value, float):
            self.add(*self.span(node), repr(value * 1.1 if value else 1.0))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def mutants_of(file: str) -> list[Mutant]:
    data = (ROOT / SOURCE / file).read_bytes()
    finder = _Finder(file, data)
    finder.visit(ast.parse(data))
    return finder.found


def _compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.applied((ROOT / SOURCE / mutant.file).read_bytes()), "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def sample(count: int, seed: int) -> list[Mutant]:
    """Module by module in turn, so that each has its part whatever its length."""
    chance = random.Random(seed)
    piles = {file: chance.sample(all_, len(all_)) for file in sorted(TESTS) if (all_ := mutants_of(file))}
    order: list[Mutant] = []
    while len(order) < count and piles:
        for file in chance.sample(sorted(piles), len(piles)):
            if _compiles(found := piles[file].pop()):
                order.append(found)
            if not piles[file]:
                del piles[file]
    return order[:count]


def tests_of(file: str) -> list[str]:
    return [f"tests/{name if '/' in name else f'unit/{name}'}.py" for name in TESTS[file].split()]


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    outcome: str  # killed, survived or late
    by: str
    seconds: float


class Lane:
    """A copy of the source, and a process that has PyTorch loaded and runs tests on the copy, each time in a fork of itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
        own = {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, __file__, "--lane", str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | own, **pipes)

    def tested(self, tests: list[str], limit: float) -> tuple[str, str]:
        """survived, killed or late, and the first test that failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"tests": tests, "limit": limit}) + "\n")
        self.process.stdin.flush()
        outcome, by = json.loads(self.process.stdout.readline())
        return outcome, by


def serve(folder: Path) -> int:
    """The process of a lane: a line of its input names tests, a line of its output says what came of them."""
    import torch  # noqa: F401 - two of the three seconds that a run of pytest takes to start

    sys.path.insert(0, str(ROOT))  # as `python -m pytest` there has it
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_forked(folder, asked["tests"]))
        code = _waited(child, asked["limit"])
        said = (folder / "log").read_text(encoding="utf-8", errors="replace")
        first = next((text for text in said.splitlines() if text.startswith(("FAILED", "ERROR"))), "")
        outcome = "late" if code is None else "killed" if code else "survived"
        print(json.dumps([outcome, first[:200] or (said[-200:] if code else "")]), flush=True)
    return 0


def _forked(folder: Path, tests: list[str]) -> int:
    os.setsid()  # so that what tests start ends with them
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &, and tests send it
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--no-header", "--tb=no", "-rfE"]
    try:
        code = int(pytest.main([*options, f"--basetemp={folder / 'tmp'}", *tests]))
        sys.stdout.flush()  # os._exit does not
        return code
    except BaseException as error:
        os.write(2, repr(error).encode())
        return 1


def _waited(child: int, limit: float) -> int | None:
    """Its exit code; None if it had to be ended after `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Bench:
    """Lanes in which mutants are tried."""

    def __init__(self, lanes: int, limit: float, *, wide: bool = False) -> None:
        self.limit, self.wide = limit, wide
        self.folder = Path(tempfile.mkdtemp(prefix="wanvram-mutants-"))
        self.lanes = [Lane(self.folder / str(number)) for number in range(lanes)]
        self.free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self.lanes:
            self.free.put(lane)

    def run(self, mutant: Mutant) -> Outcome:
        lane = self.free.get()
        path, data = lane.folder / SOURCE / mutant.file, (ROOT / SOURCE / mutant.file).read_bytes()
        start = time.monotonic()
        try:
            path.write_bytes(mutant.applied(data))
            outcome, by = self._tested(mutant.file, lane)
            return Outcome(mutant, outcome, by, time.monotonic() - start)
        finally:
            path.write_bytes(data)
            self.free.put(lane)

    def unchanged(self, file: str) -> str:
        """What fails here without a change, if anything: nothing that these tests say of a mutant would count."""
        lane = self.free.get()
        try:
            outcome, by = self._tested(file, lane)
            return "" if outcome == "survived" else f"{file}: {by or outcome}"
        finally:
            self.free.put(lane)

    def _tested(self, file: str, lane: Lane) -> tuple[str, str]:
        outcome, by = lane.tested(tests_of(file), self.limit)
        return (
            lane.tested(["tests/unit", "tests/parity"], self.limit)
            if self.wide and outcome == "survived"
            else (outcome, by)
        )

    def close(self) -> None:
        for lane in self.lanes:
            with lane.process:  # closes its pipes and waits for it
                lane.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def judge(document: dict[str, Any]) -> int:
    """Survivors with a reason that begins with `equivalent` do not matter; all others do."""
    rows = document["mutants"]
    matter = [row for row in rows if row["outcome"] != "survived" or not row["reason"].startswith("equivalent")]
    lived = [row for row in matter if row["outcome"] == "survived"]
    share = 1 - len(lived) / len(matter) if matter else 1.0
    print(
        f"{len(rows)} mutants, {len(rows) - len(matter)} equivalent; of {len(matter)} that matter {share:.1%} were killed"
    )
    for row in lived:
        print(f"  {row['place']}: {row['old']!r} => {row['new']!r}  {row['reason'] or '(no reason given)'}")
    for text in document.get("left_out", ()):
        print(f"BROKEN without a change: {text}")
    if share < LEAST_KILLED:
        print(f"BROKEN {share:.1%} killed, {LEAST_KILLED:.0%} asked for")
    return int(share < LEAST_KILLED or bool(document.get("left_out")))


def rows_of(outcomes: list[Outcome]) -> Iterator[dict[str, Any]]:
    for o in outcomes:
        row = asdict(o) | {"place": o.mutant.place, "old": o.mutant.old, "new": o.mutant.new, "reason": ""}
        del row["mutant"]
        yield row | {"seconds": round(o.seconds, 1)}


def write(out: Path, args: argparse.Namespace, outcomes: list[Outcome], broken: list[str]) -> dict[str, Any]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    document = {
        "commit": commit.stdout.strip(),
        "seed": args.seed,
        "count": args.count,
        "left_out": broken,
        "mutants": [*rows_of(outcomes)],
    }
    out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return document


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0, help="after which a mutant counts as killed")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    parser.add_argument("--wide", action="store_true", help="then give --seconds 1200 or so")
    parser.add_argument("--only", metavar="FILE:LINE:COLUMN")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="a result whose survivors have reasons")
    parser.add_argument("--lane", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.lane:
        return serve(args.lane)
    if args.judge:
        return judge(json.loads(args.judge.read_text(encoding="utf-8")))
    chosen = (
        [m for f in TESTS for m in mutants_of(f) if m.place == args.only]
        if args.only
        else sample(args.count, args.seed)
    )
    if args.list:
        print("\n".join(f"{m.place}: {m.old!r} => {m.new!r}" for m in chosen))
        return 0
    bench, outcomes = Bench(args.lanes, args.seconds, wide=args.wide), []
    try:
        with ThreadPoolExecutor(args.lanes) as pool:
            broken = [text for text in pool.map(bench.unchanged, sorted({m.file for m in chosen})) if text]
            print("\n".join(f"fails without a change, left out: {text}" for text in broken), flush=True)
            sound = [m for m in chosen if not any(text.startswith(f"{m.file}: ") for text in broken)]
            for outcome in pool.map(bench.run, sound):
                outcomes.append(outcome)
                m = outcome.mutant
                print(f"{outcome.outcome:8} {outcome.seconds:5.0f} s  {m.place}: {m.old!r} => {m.new!r}", flush=True)
                document = write(args.out, args, outcomes, broken)
    finally:
        bench.close()
    return judge(document)


if __name__ == "__main__":
    sys.exit(main())

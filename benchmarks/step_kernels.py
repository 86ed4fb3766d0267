"""Where the time of one steady denoising step goes, kernel by kernel, beside what its products and attention take alone.

    python benchmarks/step_kernels.py --attention fa4 --out benchmarks/2026-11-30_h200_step_kernels_fa4.json       all three; 5 minutes
    python benchmarks/step_kernels.py --only 1.3B-480P --attention cudnn --out a.json                              one; 40 s
    python benchmarks/step_kernels.py list                                                                         groups and cases; no GPU

Each case is a process of its own: the pipeline itself, random weights at full size, streamed, under the caps of
attention_backends.py. Of five steps the first warms up, two are timed as they are, one goes by while the profiler starts, and one is
profiled (torch.profiler, the GPU's activities alone). Then, at the clock of that minute, each product and each attention of a step is
timed alone, and all of one block in turn. This process reads SM clock and power from NVML meanwhile, so that the one that works is left
alone. Which group a kernel belongs to is decided by its name, because nothing else is recorded of it: those that no rule knows are
`other`, and the exit code is 1 where they are more than 2 % of the kernels' time, or where the profiled step took over 5 % longer than
the plain ones, so that the table is not of them.

Expected, written before the first run: besides products and attention a step moves 29.8 GB a block and forward at 14B 720P (four
modulated norms 9.3, norms with and without rotary 4.8, GELU 4.2, gated adds 7.7, the plain add 3.9), 2.4 TB a step: 0.65 s of about
19.9 at the 3.7 TB/s that the time model counts, 0.28 of 5.2 at 14B 480P, 0.06 of 0.95 at 1.3B. Gaps under 0.5 % at 14B and under 4 % at
1.3B, whose kernels are shortest.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from attention_backends import CASES, Case, timed
from nvml_watch import gpu_facts, gpu_of
from provenance import ResultFile, circumstances, conclude

__all__ = ["Activity", "group_of", "judge", "table"]

SCRIPTS = ("step_kernels.py", "attention_backends.py", "nvml_watch.py", "provenance.py")
STEADY = 2  # steps timed without a profiler, after the first
STEPS = 1 + STEADY + 2
ALONE_SECONDS = 1.0  # of each product and attention alone, at least
BLOCK_SECONDS = 4.0  # of all of one block in turn
MOST_OTHER = 0.02  # of the kernels' time in no group
MOST_DISTURBED = 0.05  # of a step by the profiler
NAME_LENGTH = 160  # of CUTLASS's names, which have up to 2000 characters
KERNELS_KEPT = 60
GAP_KEPT = 10
Row = dict[str, Any]


# --- groups: pure, of names -----------------------------------------------------------------------------------------------------

PRODUCTS, FUSED, ATTENTION = "products", "products with a fused epilogue", "attention"
HOST, DEVICE, OTHER = "copies host-device", "copies in the device", "other"
COPY = "gpu_memcpy"  # torch.profiler's categories
FILL = "gpu_memset"
KERNEL = "kernel"

# The first whose word a kernel's name has. flash-attn-4 is made with CUTLASS, so attention comes before products.
WORDS = (
    (ATTENTION, ("sdpa", "flash", "fmha", "attention")),
    ("modulation", ("_layer_norm_modulate_kernel",)),
    ("norm and rotary", ("_rms_norm", "_scaled_rope", "_inverse_rms")),
    ("gated add", ("_gated_add_kernel",)),
    ("GELU", ("_gelu_tanh_kernel",)),
    ("scaling to 8 bits", ("_quantize", "_to_fp8")),
    (PRODUCTS, ("gemm", "nvjet", "cublas", "cutlass", "xmma")),
    (DEVICE, ("copy_kernel", "catarray")),
    ("plain add", ("functor_add", "_add_kernel")),
    ("PyTorch's other kernels", ("at::native",)),
)
EPILOGUES = ("bias", "gelu", "relu")  # in the names of cuBLAS's kernels that have one


@dataclass(frozen=True)
class Activity:
    """One of the GPU's, as torch.profiler writes it. Microseconds."""

    category: str
    name: str
    stream: int
    start: float
    duration: float
    grid: tuple[int, ...] = ()
    nbytes: int = 0


def group_of(activity: Activity) -> str:
    if activity.category == COPY:
        return DEVICE if "DtoD" in activity.name else HOST
    if activity.category == FILL:
        return DEVICE
    name = activity.name.lower()
    found = next((group for group, words in WORDS if any(word in name for word in words)), OTHER)
    return FUSED if found == PRODUCTS and any(word in name for word in EPILOGUES) else found


def activities(trace: Mapping[str, Any]) -> list[Activity]:
    """The GPU's in a trace of torch.profiler, by their start."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in (KERNEL, COPY, FILL):
            args = event.get("args", {})
            found.append(
                Activity(
                    event["cat"],
                    event["name"],
                    int(args.get("stream", 0)),
                    float(event["ts"]),
                    float(event["dur"]),
                    tuple(args.get("grid", ())),
                    int(args.get("bytes", 0)),
                )
            )
    return sorted(found, key=lambda activity: activity.start)


def table(found: Sequence[Activity]) -> dict[str, Any]:
    """Groups, kernels and gaps of a profiled step; milliseconds, shares of the time from the compute stream's first to its last.

    The compute stream is the one whose kernels take longest; what other streams do is said, and is no part of its sums.
    """
    totals: dict[int, float] = defaultdict(float)
    for activity in found:
        totals[activity.stream] += activity.duration if activity.category == KERNEL else 0.0
    stream = max(totals, key=lambda number: totals[number])
    mine = [activity for activity in found if activity.stream == stream]
    span = max(a.start + a.duration for a in mine) - mine[0].start
    groups = _summed(mine, group_of, span)
    beside = _summed([a for a in found if a.stream != stream], group_of, span)
    kernels = _summed(mine, _kind, span)
    rows = [
        {"group": group, "kernel": name[:NAME_LENGTH], "grid": list(grid)} | figures
        for (group, name, grid), figures in kernels.items()
    ]
    rest = rows[KERNELS_KEPT:]
    return {
        "span_ms": span / 1000,
        "groups": [{"group": name} | figures for name, figures in groups.items()],
        "beside": [{"group": name} | figures for name, figures in beside.items()],
        "gaps": _gaps(mine, span),
        "kernels": rows[:KERNELS_KEPT],
        "left_out": {"kinds": len(rest), "ms": sum(row["ms"] for row in rest)},
    }


def _kind(activity: Activity) -> tuple[str, str, tuple[int, ...]]:
    """Products are told apart by their grid, which follows from their shape."""
    group = group_of(activity)
    return group, activity.name, activity.grid if group in (PRODUCTS, FUSED, ATTENTION) else ()


def _summed(found: Sequence[Activity], key: Callable[[Activity], Any], span: float) -> dict[Any, dict[str, Any]]:
    """Count, milliseconds, share and bytes copied by key, the longest first."""
    sums: dict[Any, list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for activity in found:
        entry = sums[key(activity)]
        entry[0] += 1
        entry[1] += activity.duration
        entry[2] += activity.nbytes
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return {
        name: {"count": int(count), "ms": us / 1000, "share": us / span} | ({"bytes": int(size)} if size else {})
        for name, (count, us, size) in ordered
    }


def _gaps(mine: Sequence[Activity], span: float) -> dict[str, Any]:
    """When nothing ran on the stream, and between which kernels that was longest."""
    found, end, last = [], mine[0].start, mine[0]
    for activity in mine:
        if activity.start > end:
            found.append((activity.start - end, last.name, activity.name))
        if activity.start + activity.duration >= end:
            end, last = activity.start + activity.duration, activity
    found.sort(key=lambda gap: -gap[0])
    total = sum(us for us, _, _ in found)
    return {
        "count": len(found),
        "ms": total / 1000,
        "share": total / span,
        "median_us": median(us for us, _, _ in found) if found else 0.0,
        "longest": [{"us": us, "after": a[:60], "before": b[:60]} for us, a, b in found[:GAP_KEPT]],
    }


# --- judging: pure, of rows -----------------------------------------------------------------------------------------------------


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """By case: the plain step beside its floor and the groups' shares; `breaches`: a table that cannot be relied on."""
    summary: dict[str, Any] = {}
    breaches = []
    for row in rows:
        if row["kind"] != "step":
            continue
        name = f"{row['case']} {row['backend']}"
        floor = next((r for r in rows if r["kind"] == "floor" and (r["case"], r["backend"]) == _of(row)), None)
        plain = median(row["steady_seconds"])
        ms = {entry["group"]: entry["ms"] for entry in row["groups"]}
        summary[name] = {
            "step_seconds": plain,
            "profiled_seconds": row["profiled_seconds"],
            "floor_seconds": floor and floor["block_seconds"],
            "ratio": floor and plain / floor["block_seconds"],
            "groups_ms": ms,
            "gaps_ms": row["gaps"]["ms"],
        }
        other = ms.get(OTHER, 0.0) / sum(ms.values())
        if other > MOST_OTHER:
            breaches.append(f"{name}: {other:.1%} of the kernels' time is in no group, at most {MOST_OTHER:.0%}")
        if row["profiled_seconds"] > plain * (1 + MOST_DISTURBED):
            breaches.append(
                f"{name}: profiled, a step took {row['profiled_seconds']:.3f} s, {plain:.3f} without: at most {MOST_DISTURBED:.0%} more"
            )
    return {"cases": summary, "breaches": breaches}


def _of(row: Row) -> tuple[str, str]:
    return row["case"], row["backend"]


# --- one case, in a process of its own ------------------------------------------------------------------------------------------


class _Profiled(BaseException):
    """Ends the run after the profiled step: no failure, so no Exception."""


def step_here(case: Case, backend: str, more: Mapping[str, Any], say: Callable[[Row], None]) -> None:
    """more: other knobs of the strategy."""
    from wanvram.machine.allocator_settings import put_in_force

    put_in_force(True)  # before torch is imported
    import torch

    from wanvram.config import RunConfig
    from wanvram.recorder.recorder import Recorder
    from wanvram.run.execute import assembled, make_device

    asked = case.config(backend, STEPS)
    asked["optimization"] |= more
    config = RunConfig.from_dict(asked)
    device = make_device(config)
    recorder = Recorder(device.meter, None, None)
    pipeline = assembled(device, config, recorder).pipeline
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA],
            schedule=torch.profiler.schedule(wait=STEPS - 2, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda ready: ready.export_chrome_trace(str(trace)),
        )

        def stepped() -> None:
            ends.append(time.monotonic())
            profiler.step()
            if len(ends) == STEPS:
                raise _Profiled

        pipeline.trace_step = stepped
        with profiler, suppress(_Profiled), device.session():
            pipeline.run(lambda index: nullcontext(None))
        found = activities(json.loads(trace.read_text(encoding="utf-8")))
    seconds = [child.seconds for child in recorder.open_spans[0].children if child.seconds is not None]
    row: Row = {"kind": "step", "case": case.name, "backend": backend, "knobs": dict(more), "first_seconds": seconds[0]}
    row |= {"steady_seconds": seconds[1 : 1 + STEADY], "profiled_seconds": seconds[-1]}
    row |= {"attention": device.attention.taken if device.attention else None}
    windows = {"steady": [ends[0], ends[STEADY]], "profiled": [ends[-1] - seconds[-1], ends[-1]]}
    say(row | {"windows": windows} | table(found))
    del pipeline
    gc.collect()
    torch.cuda.empty_cache()
    floor_here(case, backend, say)


def floor_here(case: Case, backend: str, say: Callable[[Row], None]) -> None:
    """Every product and attention of a step alone, and all of one block in turn; seconds of a step each."""
    import torch

    parts = _parts_of_a_step(torch, case, backend)
    row: Row = {"kind": "floor", "case": case.name, "backend": backend, "windows": {}, "parts": []}
    for name, count, flops, call in parts:
        each = timed(torch, call, 1)
        begun = time.monotonic()
        each = timed(torch, call, max(3, math.ceil(ALONE_SECONDS / each)))
        row["windows"][name] = [begun, time.monotonic()]
        row["parts"].append(
            {
                "part": name,
                "count": count,
                "ms_each": each * 1000,
                "seconds": each * count,
                "tflops": flops / each / 1e12,
            }
        )

    def block() -> None:
        for _, count, _, call in parts:
            for _ in range(count // parts[0][1]):
                call()

    each = timed(torch, block, 1)
    begun = time.monotonic()
    each = timed(torch, block, max(2, math.ceil(BLOCK_SECONDS / each)))
    row["windows"]["block"] = [begun, time.monotonic()]
    total = sum(part["seconds"] for part in row["parts"])
    say(row | {"parts_seconds": total, "block_seconds": each * parts[0][1]})


def _parts_of_a_step(torch: Any, case: Case, backend: str) -> list[tuple[str, int, float, Callable[[], None]]]:
    """(name, how often in a step, operations, call): over all row chunks of the video each; the first is there once a block."""
    from wanvram.config import RunConfig
    from wanvram.kernels.scaled_attention import attention
    from wanvram.knobs import chunk_rows
    from wanvram.specs import DIT

    request = RunConfig.from_dict(case.config(backend)).request
    spec = DIT[request.facts.dit]
    tokens = request.geometry.tokens(request.geometry.latent_shape(request.frame_num, request.height, request.width))
    rows = chunk_rows(tokens, None)
    sizes = [min(rows, tokens - start) for start in range(0, tokens, rows)]
    blocks = 2 * spec.block_count  # with and without the prompt

    def matrix(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.float32).mul_(0.02).bfloat16()

    def product(inputs: int, outputs: int) -> Callable[[], None]:
        x, weight, bias = matrix(rows, inputs), matrix(outputs, inputs), matrix(outputs)

        def call() -> None:
            for size in sizes:
                torch.addmm(bias, x[:size], weight.t())

        return call

    q = matrix(rows, spec.num_heads, spec.head_dim)

    def attend(keys: int) -> Callable[[], None]:
        k, v = matrix(keys, spec.num_heads, spec.head_dim), matrix(keys, spec.num_heads, spec.head_dim)

        def call() -> None:
            for size in sizes:
                attention(q[:size], k, v, backend)

        return call

    dim, ffn = spec.dim, spec.ffn_dim
    return [
        (f"attention {spec.num_heads} x {tokens} x {tokens}", blocks, 4.0 * tokens * tokens * dim, attend(tokens)),
        (f"attention {spec.num_heads} x {tokens} x 512", blocks, 4.0 * tokens * 512 * dim, attend(512)),
        (f"product {tokens} x {dim} x {dim}", 6 * blocks, 2.0 * tokens * dim * dim, product(dim, dim)),
        (f"product {tokens} x {dim} x {ffn}", blocks, 2.0 * tokens * dim * ffn, product(dim, ffn)),
        (f"product {tokens} x {ffn} x {dim}", blocks, 2.0 * tokens * dim * ffn, product(ffn, dim)),
    ]


# --- watching from the process beside it ----------------------------------------------------------------------------------------


class _Watch:
    """SM clock and power every 50 ms, with the moment of each reading on the clock that all processes share."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._readings: list[tuple[float, int, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def facts(self) -> dict[str, Any]:
        return gpu_facts(self._nvml, self._handle)

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            facts = gpu_facts(self._nvml, self._handle)
            if facts["sm_clock_mhz"] is not None and facts["power_watt"] is not None:
                self._readings.append((time.monotonic(), facts["sm_clock_mhz"], facts["power_watt"]))

    def between(self, begun: float, ended: float) -> dict[str, Any]:
        """Medians; None where it never read."""
        inside = [(clock, watt) for at, clock, watt in self._readings if begun <= at <= ended]
        clocks, watts = [clock for clock, _ in inside], [watt for _, watt in inside]
        return {
            "readings": len(inside),
            "sm_clock_mhz": median(clocks) if clocks else None,
            "power_watt": round(median(watts), 1) if watts else None,
        }

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def _watching() -> Iterator[_Watch]:
    watch = _Watch()
    try:
        yield watch
    finally:
        watch.close()


def rows_of(case: Case, backend: str, more: Mapping[str, Any], watch: _Watch) -> Iterator[Row]:
    """What a process of its own says, with the clock and the power of each of its windows."""
    command = [sys.executable, __file__, "--here", case.name, backend, json.dumps(more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                windows = row.pop("windows")
                yield row | {"gpu": {name: watch.between(*window) for name, window in windows.items()}}
    if process.returncode:
        raise SystemExit(f"{case.name} {backend}: the process failed with exit code {process.returncode}")


def shown(row: Row) -> str:
    """Lines of a row."""
    if row["kind"] == "floor":
        lines = [
            f"{row['case']} {row['backend']} alone: block by block {row['block_seconds']:.3f} s a step, each {row['parts_seconds']:.3f} s"
        ]
        lines += [
            f"  {part['seconds']:8.3f} s  {part['count']:5d} x {part['ms_each']:9.3f} ms  {part['tflops']:6.1f} TFLOP/s  {part['part']}"
            for part in row["parts"]
        ]
        return "\n".join([*lines, *_said_of_gpu(row)])
    plain = ", ".join(f"{seconds:.3f}" for seconds in row["steady_seconds"])
    lines = [
        f"{row['case']} {row['backend']}: steps of {plain} s, first {row['first_seconds']:.3f}, profiled {row['profiled_seconds']:.3f}; "
        f"first to last kernel {row['span_ms']:.1f} ms"
    ]
    lines += [f"  {g['ms']:10.1f} ms {g['share']:7.2%} {g['count']:7d}  {g['group']}" for g in row["groups"]]
    gaps = row["gaps"]
    lines.append(
        f"  {gaps['ms']:10.1f} ms {gaps['share']:7.2%} {gaps['count']:7d}  nothing, {gaps['median_us']:.1f} us in the median"
    )
    lines += [f"  beside: {g['ms']:.1f} ms of {g['group']}, {g.get('bytes', 0) / 1e9:.1f} GB" for g in row["beside"]]
    lines += [f"    {k['ms']:9.1f} ms {k['count']:6d}  {k['kernel'][:90]} {k['grid']}" for k in row["kernels"][:15]]
    return "\n".join([*lines, *_said_of_gpu(row)])


def _said_of_gpu(row: Row) -> list[str]:
    return [f"  {name}: {gpu['sm_clock_mhz']} MHz, {gpu['power_watt']} W" for name, gpu in row["gpu"].items()]


# --- command line ---------------------------------------------------------------------------------------------------------------


def here(name: str, backend: str, more: str) -> int:
    def say(row: Row) -> None:
        print("ROW " + json.dumps(row), flush=True)

    step_here(next(case for case in CASES if case.name == name), backend, json.loads(more), say)
    return 0


def run(args: argparse.Namespace) -> int:
    wanted = args.only.split(",") if args.only else [case.name for case in CASES]
    if unknown := set(wanted) - {case.name for case in CASES}:
        raise SystemExit(f"--only: {', '.join(sorted(unknown))} unknown; cases are {', '.join(c.name for c in CASES)}")
    with _watching() as watch:
        header = {"date": datetime.now(timezone.utc).isoformat(), "gpu": watch.facts(), "steps": STEPS}
        result = ResultFile(args.out, header | circumstances(*SCRIPTS), judge)
        for case in (case for case in CASES if case.name in wanted):
            for row in rows_of(case, args.attention, json.loads(args.knobs), watch):
                result.append(row)
                print(shown(row), flush=True)
    return conclude(judge(result.rows))


def main() -> int:
    if sys.argv[1:2] == ["--here"]:
        return here(*sys.argv[2:5])
    if sys.argv[1:2] == ["list"]:
        print("\n".join([*(str(case) for case in CASES), *(f"{group}: {', '.join(words)}" for group, words in WORDS)]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"cases, separated by commas (default: {','.join(case.name for case in CASES)})")
    parser.add_argument("--attention", choices=("fa4", "cudnn"), default="fa4")
    parser.add_argument("--knobs", default="{}", help="other knobs of the strategy, as JSON")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

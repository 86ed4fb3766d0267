"""Reads a 2 GiB profiler trace and a 1 GiB allocator snapshot, each in a fresh process: seconds and peak resident memory.

    python benchmarks/big_files.py --trace-gib 2 --snapshot-gib 1 --out benchmarks/big-files-DATE.json

The files repeat the events of one denoising step as torch 2.11 writes them; they are made in a temporary folder and deleted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB = 1 << 30
LIMIT_SECONDS, LIMIT_BYTES = 120, GIB
BLOCKS = 40  # transformer blocks of one step
BASE = 3 << 30  # bytes of weights that stay allocated


def step_sizes() -> list[int]:
    """The bytes of the activations of one block, in the order of their allocation; freed in another order."""
    return [335_544_320, 167_772_160, 1_048_576, 13_824, 83_886_080, 167_772_160, 671_088_640, 4_096]


# --- the trace -------------------------------------------------------------------------------------------------------------


def _event(kind: str, name: str, track: str, args: str) -> str:
    """One event as Kineto lays it out; {ts}, {dur} and {id} are filled in for each."""
    times = '"ts": {ts:.3f}' + ("" if kind.startswith('"i"') else ', "dur": {dur:.3f}')
    return f'  {{{{\n    "ph": {kind}, "name": "{name}", {track},\n    {times},\n    "args": {{{{\n      {args}\n    }}}}\n  }}}},\n'


_HOST = '"pid": 4711, "tid": 4711'
_OP = _event(
    '"X", "cat": "cpu_op"',
    "{name}",
    _HOST,
    '"External id": {id},"Record function id": 0, "Concrete Inputs": ["", "", ""], "Input type": ["c10::BFloat16", "", ""], '
    '"Input Strides": [[167772160, 5120, 1], [], []], "Input Dims": [[1, 32760, 5120], [], []], "Ev Idx": {id}',
)
_MEMORY = _event(
    '"i", "cat": "cpu_instant_event", "s": "t"',
    "[memory]",
    _HOST,
    '"Total Reserved": {reserved}, "Total Allocated": {allocated}, "Bytes": {bytes}, "Device Id": 0, "Device Type": 1, '
    '"Addr": 139637976727552, "Ev Idx": {id}',
)
_KERNEL = _event(
    '"X", "cat": "kernel"',
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >"
    "(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)",
    '"pid": 0, "tid": 7',
    '"External id": {id}, "queued": 0, "device": 0, "context": 1, "stream": 7, "correlation": {id}, '
    '"registers per thread": 32, "shared memory": 0, "blocks per SM": 248.2, "warps per SM": 992.7, '
    '"grid": [32760, 1, 1], "block": [128, 1, 1], "est. achieved occupancy %": 100',
)


def write_trace(path: Path, size: int) -> dict[str, Any]:
    """Steps until the file is large enough; as in a real trace the memory events follow all operators."""
    ts, number, steps, peak = 1_000.0, 0, 0, 0
    memory: list[tuple[float, int, int]] = []
    with path.open("w") as file:
        file.write(
            '{\n  "schemaVersion": 1,\n  "deviceProperties": [],\n  "displayTimeUnit": "ms",\n  "traceEvents": [\n'
        )
        while file.tell() * 1.47 < size:  # the memory events add nearly half
            start, steps = ts, steps + 1
            for _ in range(BLOCKS):
                for i, bytes_ in enumerate(step_sizes()):
                    file.write(_OP.format(name=("aten::linear", "aten::add")[i % 2], ts=ts, dur=9.0, id=number))
                    file.write(_OP.format(name=("aten::mm", "aten::empty")[i % 2], ts=ts + 2, dur=5.0, id=number + 1))
                    file.write(_KERNEL.format(ts=ts + 5, dur=8.0, id=number))
                    memory.append((ts + 3, bytes_, 1))
                    number, ts = number + 2, ts + 10
                memory.extend((ts + 0.1 * i, bytes_, -1) for i, bytes_ in enumerate(step_sizes()))
                ts += 2
            file.write(
                f'  {{"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#{steps}", "pid": 4711, "tid": 4711, '
                f'"ts": {start:.3f}, "dur": {ts - start:.3f}}},\n'
            )
        allocated = BASE
        for at, bytes_, sign in memory:
            allocated += sign * bytes_
            peak = max(peak, allocated)
            file.write(_MEMORY.format(ts=at, reserved=6 << 30, allocated=allocated, bytes=sign * bytes_, id=number))
        file.write('  {"ph": "M", "name": "end", "pid": 0, "tid": 0}\n  ],\n  "traceName": "trace.json"\n}\n')
    return {"peak_allocated_bytes": peak, "steps": steps}


# --- the snapshot ----------------------------------------------------------------------------------------------------------


def _entries(stacks: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The events of one step after another; every allocation and every free has a stack of its own, as in torch."""
    at, now = 0x7F0000000000, 1_763_984_000_000_000
    yield _entry("segment_alloc", at, BASE, now, stacks[0])
    yield _entry("alloc", at, BASE, now, stacks[0])
    heap = at + BASE
    for size in step_sizes():
        held = 2 << 20 if size <= 1 << 20 else -(-size // (2 << 20)) * (2 << 20)
        yield _entry("segment_alloc", heap, held, now, stacks[0])
        heap += held
    while True:
        for block in range(BLOCKS):
            address = at + BASE
            live = []
            for i, size in enumerate(step_sizes()):
                now += 3
                yield _entry("alloc", address, size, now, stacks[(block + i) % len(stacks)])
                live.append((address, size))
                address += 2 << 20 if size <= 1 << 20 else -(-size // (2 << 20)) * (2 << 20)
            for i, (address, size) in enumerate(live):
                now += 2
                yield _entry("free_requested", address, size, now, stacks[(block + 2 * i) % len(stacks)])
                yield _entry("free_completed", address, size, now, stacks[(block + 2 * i) % len(stacks)])


def _entry(action: str, addr: int, size: int, now: int, stack: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "action": action, "addr": addr, "size": size, "stream": 0, "time_us": now,
        "compile_context": str(b"N/A", "ascii"), "user_metadata": "", "frames": list(stack),
    }  # fmt: skip  # "N/A" is a new object in every entry, as in torch


def write_snapshot(path: Path, size: int) -> dict[str, Any]:
    frames = [
        {"name": f"function_{i}", "filename": f"/venv/site-packages/torch/nn/modules/file_{i % 40}.py", "line": 10 + i}
        for i in range(400)
    ] + [{"name": "forward", "filename": f"/work/models/dit_{i}.py", "line": 100 + i} for i in range(100)]
    stacks = [[frames[(7 * i + k) % 400] for k in range(6)] + frames[400 + i % 90 : 410 + i % 90] for i in range(300)]
    trace = list(itertools.islice(_entries(stacks), size // 135))  # about 135 bytes each
    content = {"segments": [], "device_traces": [trace], "allocator_settings": {}, "external_annotations": []}
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=4)
    return {"peak_allocated_bytes": BASE + sum(-(-s // 512) * 512 for s in step_sizes()), "events": len(trace)}


# --- measuring -------------------------------------------------------------------------------------------------------------


def read(kind: str, path: Path) -> dict[str, Any]:
    began = time.perf_counter()
    if kind == "trace":
        from wanvram.analysis.trace import read_trace

        trace = read_trace(path)
        assert trace.main is not None
        found = {
            "events": trace.events,
            "peak_allocated_bytes": trace.main.peak_allocated_bytes,
            "steps": len(trace.steps),
        }
    else:
        from wanvram.analysis.snapshot import read_snapshot

        history = read_snapshot(path).main
        found = {"events": history.events, "peak_allocated_bytes": history.peak_allocated_bytes}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time(), 1)}
    return {**seconds, "peak_rss_bytes": rss, **found}


def in_process(*arguments: str) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(done.stdout)


def measure(kind: str, size: int, folder: Path) -> dict[str, Any]:
    path = folder / f"big.{kind}"
    expected = in_process("--make", kind, str(path), str(size))
    found = in_process("--read", kind, str(path))
    result = {"file_bytes": path.stat().st_size, **found}
    path.unlink()
    wrong = {key: (found[key], value) for key, value in expected.items() if found[key] != value}
    if wrong:
        raise SystemExit(f"{kind}: read (found, written) {wrong}")
    result["within_limits"] = found["seconds"] < LIMIT_SECONDS and found["peak_rss_bytes"] < LIMIT_BYTES
    print(f"{kind}: {result}", file=sys.stderr)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace-gib", type=float, default=2.0)
    parser.add_argument("--snapshot-gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        kind, path, size = args.make
        write = write_trace if kind == "trace" else write_snapshot
        print(json.dumps(write(Path(path), int(size))))
        return 0
    if args.read:
        print(json.dumps(read(args.read[0], Path(args.read[1]))))
        return 0
    with tempfile.TemporaryDirectory(prefix="wanvram-big-") as folder:
        results = {
            "trace": measure("trace", int(args.trace_gib * GIB), Path(folder)),
            "snapshot": measure("snapshot", int(args.snapshot_gib * GIB), Path(folder)),
        }
    report = {
        "limits": {"seconds": LIMIT_SECONDS, "peak_rss_bytes": LIMIT_BYTES},
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "results": results,
    }  # fmt: skip
    text = json.dumps(report, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text, end="")
    beyond = [kind for kind, result in results.items() if not result["within_limits"]]
    for kind in beyond:
        print(f"BROKEN {kind}: beyond {LIMIT_SECONDS} s or {LIMIT_BYTES:,} bytes of RAM", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())

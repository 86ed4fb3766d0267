"""Runs a command and watches, from this process, the memory that NVML reports for the whole GPU.

    python benchmarks/nvml_watch.py --out watch.json -- python -m wanvram generate --weights random --vram_budget 8GiB ...

Reads `used` of nvmlDeviceGetMemoryInfo every 2 ms of the GPU that the command sees first (CUDA_VISIBLE_DEVICES): for 0.2 s before
the command starts, while it runs, and after it until the memory is back. Imports nothing of wanvram. Ends with the command's exit
code; the report says: memory before (median), at its highest and the difference, how quiet the GPU was, wall clock and peak RAM
of the command, the end of what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["gpu_facts", "gpu_of", "watch"]

MIB = 2**20
INTERVAL = 0.002  # seconds between readings
QUIET_WINDOW = 0.2  # seconds of readings before the command starts
QUIET_BYTES = MIB  # readings further apart than this belong to somebody who comes or goes
PATIENCE = 10.0  # seconds to wait for a quiet GPU, before and after
CLOCK_INTERVAL = 0.5  # seconds between readings of clock and power, which are slower ones
CONTEXT_BYTES = (
    64 * MIB
)  # more than this above `before` is a CUDA context at least: the command has begun to use the GPU
TAIL_LINES = 30


def gpu_of(nvml: Any, visible: str | None) -> Any:
    """NVML's handle of the first GPU of a CUDA_VISIBLE_DEVICES, by index or UUID. Raises ValueError if it shows none."""
    count = nvml.nvmlDeviceGetCount()
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first.startswith("GPU-"):
        found = [handle for handle in handles if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(first)]
    else:
        found = handles[int(first) :][:1] if first.isascii() and first.isdigit() else []
    if len(found) != 1:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} names none of the {count} GPUs here")
    return found[0]


def gpu_facts(nvml: Any, handle: Any) -> dict[str, Any]:
    """Name, UUID, total bytes and driver; SM clock and power as they are now."""
    return {
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "uuid": _text(nvml.nvmlDeviceGetUUID(handle)),
        "total_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "driver": _text(nvml.nvmlSystemGetDriverVersion()),
        **_clock_and_power(nvml, handle),
    }


def _clock_and_power(nvml: Any, handle: Any) -> dict[str, Any]:
    return {
        "sm_clock_mhz": _asked(nvml, lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
        "power_watt": _asked(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _asked(nvml: Any, question: Callable[[], Any]) -> Any:
    """The answer, None where this GPU has none."""
    try:
        return question()
    except nvml.NVMLError:
        return None


class Readings:
    """What NVML said, as far as the report needs it."""

    def __init__(self, nvml: Any, handle: Any, interval: float) -> None:
        self._nvml = nvml
        self._handle = handle
        self._interval = interval
        self._last: float | None = None
        self._clock_read = 0.0
        self.peak = 0
        self.count = 0
        self.longest_gap = 0.0
        self.sm_clock: int | None = None
        self.power: float | None = None

    def now(self) -> int:
        """Bytes used on the whole GPU; waits for the interval first."""
        time.sleep(self._interval)
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def quiet(self) -> tuple[int, int]:
        """(median, spread) of the last 0.2 s, once those readings agree or patience is over."""
        start = time.monotonic()
        while True:
            window: list[int] = []
            begun = time.monotonic()
            while len(window) < 3 or time.monotonic() - begun < QUIET_WINDOW:
                window.append(self.now())
            spread = max(window) - min(window)
            if spread <= QUIET_BYTES or time.monotonic() - start > PATIENCE:
                return int(median(window)), spread

    def poll(self) -> int:
        """One reading while the command runs, kept as the peak if it is one."""
        used = self.now()
        at = time.monotonic()
        if self._last is not None:
            self.longest_gap = max(self.longest_gap, at - self._last)
        self._last = at
        self.peak = max(self.peak, used)
        self.count += 1
        if at - self._clock_read > CLOCK_INTERVAL:
            self._clock_read = at
            self._read_clock()
        return used

    def _read_clock(self) -> None:
        facts = _clock_and_power(self._nvml, self._handle)
        self.sm_clock = max(filter(None, (self.sm_clock, facts["sm_clock_mhz"])), default=None)
        self.power = max(filter(None, (self.power, facts["power_watt"])), default=None)

    def settled(self, before: int) -> int:
        """Bytes used once the command's memory has been given back, or when patience is over."""
        start = time.monotonic()
        used = self.now()
        while used > before + QUIET_BYTES and time.monotonic() - start < PATIENCE:
            used = self.now()
        return used


def watch(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    interval: float = INTERVAL,
    nvml: Any = None,
) -> dict[str, Any]:
    """The report of one run of the command, as plain JSON values; bytes and seconds.

    timeout: seconds until the command is killed. nvml: what to ask instead of the driver's library. Raises ValueError or NVMLError
    without a GPU to watch.
    """
    nvml = nvml or import_module("pynvml")
    nvml.nvmlInit()
    visible = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
    handle = gpu_of(nvml, visible)
    readings = Readings(nvml, handle, interval)
    before, spread = readings.quiet()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        result = _run(command, readings, before, timeout, env=env, cwd=cwd, stdout=out, stderr=err)
        result |= {"stdout_tail": _tail(out), "stderr_tail": _tail(err)}
    peak = max(readings.peak, before)
    return {
        "command": list(command),
        "visible": visible,
        "gpu": gpu_facts(nvml, handle),
        "before_bytes": before,
        "before_spread_bytes": spread,
        "peak_bytes": peak,
        "above_bytes": peak - before,
        "after_bytes": readings.settled(before),
        "polls": readings.count,
        "longest_gap_seconds": readings.longest_gap,
        "highest_sm_clock_mhz": readings.sm_clock,
        "highest_power_watt": readings.power,
        **result,
    }


def _run(
    command: Sequence[str], readings: Readings, before: int, timeout: float | None, **options: Any
) -> dict[str, Any]:
    """Starts the command, polls until it ends, and says how it ended."""
    first_use: float | None = None
    timed_out = False
    start = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, **options) as process:
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                seconds = time.monotonic() - start
                if pid:
                    break
                if timeout is not None and seconds > timeout and not timed_out:
                    timed_out = True
                    process.kill()
                if readings.poll() - before > CONTEXT_BYTES and first_use is None:
                    first_use = time.monotonic() - start
            process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, not by Popen
        except BaseException:
            process.kill()
            raise
    return {
        "exit_code": process.returncode,
        "timed_out": timed_out,
        "seconds": seconds,
        "first_use_seconds": first_use,
        "ram_peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def _tail(file: Any) -> str:
    file.seek(0)
    return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the report")
    parser.add_argument("--cwd", type=Path, help="where the command runs (default: here)")
    parser.add_argument("--timeout", type=float, help="seconds until the command is killed")
    parser.add_argument("--interval", type=float, default=INTERVAL, help="seconds between readings")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("give the command after --")
    report = watch(command, cwd=args.cwd, timeout=args.timeout, interval=args.interval)
    waiting = args.out.with_name(args.out.name + ".part")
    waiting.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(waiting, args.out)
    code = report["exit_code"]
    return int(code) if code >= 0 else 128 - int(code)


if __name__ == "__main__":
    sys.exit(main())

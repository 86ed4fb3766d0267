"""What the driver takes of the card beside what it charges to the process: page tables of pinned memory, modules, its own.

    python benchmarks/probe_driver.py            one GPU that nobody else uses; about 20 s

Prints, and writes to <out>/<date>_<gpu>_probe_driver.json: NVML's used memory of the whole GPU less what it was before this process
had a context, beside NVML's figure of the process, after each step; and what pinning costs in time. Fails (exit 1) where a figure
is not what `wanvram.machine.driver` says: page tables beyond 2 MiB off, the driver's own beyond 1 MiB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import pynvml
import torch
from nvml_watch import gpu_of

from wanvram.machine.driver import DRIVER_BYTES, page_table_bytes

MIB = 2**20
PINS_MIB = (16, 64, 512, 512, 1024, 2048, 100, 100, 4096, 670, 670)


class Card:
    def __init__(self) -> None:
        pynvml.nvmlInit()
        self.handle = gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.before = self.used()

    def used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)

    def mine(self) -> int | None:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        return next((int(p.usedGpuMemory) for p in processes if p.pid == os.getpid()), None)

    def row(self, step: str, **more: Any) -> dict[str, Any]:
        torch.cuda.synchronize()
        row = {
            "step": step,
            "card_loses_bytes": self.used() - self.before,
            "process_bytes": self.mine(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        } | more
        print(json.dumps(row), flush=True)
        return row


def pin(nbytes: int, kept: list[Any]) -> tuple[float, float]:
    """Seconds to take zeroed pages and to pin them."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    start = time.perf_counter()
    tensor.zero_()
    zeroed = time.perf_counter()
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes, 0)) != 0:
        raise RuntimeError(f"{nbytes} bytes could not be pinned")
    kept.append(tensor)
    return zeroed - start, time.perf_counter() - zeroed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    card = Card()
    torch.cuda.init()
    rows = [card.row("context")]
    torch.cuda.Stream()
    rows.append(card.row("streams"))
    x = torch.zeros(256, 256, device="cuda", dtype=torch.bfloat16)
    rows.append(card.row("kernels"))
    torch.mm(x, x)
    rows.append(card.row("cublas"))
    kept: list[Any] = []
    pinned, missed = 0, 0
    start = rows[-1]["card_loses_bytes"]
    for nbytes in (n * MIB for n in PINS_MIB):
        seconds = pin(nbytes, kept)
        pinned += nbytes
        rows.append(card.row("pin", pinned_bytes=pinned, zero_seconds=seconds[0], register_seconds=seconds[1]))
        missed = max(missed, abs(rows[-1]["card_loses_bytes"] - start - page_table_bytes(pinned)))
    for tensor in kept:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    rows.append(card.row("unpin", kept_bytes=card.used() - card.before - start))
    own = rows[0]["process_bytes"] and rows[0]["card_loses_bytes"] - rows[0]["process_bytes"]
    wrong = missed > 2 * MIB or (own is not None and abs(own - DRIVER_BYTES) > MIB)
    document = {
        "device": torch.cuda.get_device_name(),
        "date": str(datetime.date.today()),
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        "torch": torch.__version__,
        "driver_own_bytes": own,
        "page_tables_missed_by_bytes": missed,
        "rows": rows,
    }
    name = torch.cuda.get_device_name().split()[1].lower()
    target = args.out / f"{datetime.date.today()}_{name}_probe_driver.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    print(f"Wrote {target}; page tables within {missed / MIB:.1f} MiB{', NOT as the rule says' if wrong else ''}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

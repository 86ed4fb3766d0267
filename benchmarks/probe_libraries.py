"""What CUDA libraries take beyond the tensors we ask for, on the GPU at hand. Fills simulate/libraries.py and simulate/card.py.

    python benchmarks/probe_libraries.py > $OUT/probe.json

Every probed call runs twice between two reads of the allocator's full history, so that first-call and steady-state
allocations are seen apart; device bytes outside the allocator are read from the driver after each first use of a library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

ROWS: dict[str, object] = {}


def outside() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def history(call: Callable[[], Any]) -> list[int]:
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=100000, stacks="python", clear_history=True)
    result = call()
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)
    del result
    sign = {"alloc": 1, "free_completed": -1}
    return [sign[e["action"]] * e["size"] for e in trace if e["action"] in sign]


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def probe(name: str, call: Callable[[], Any], timed: bool = False) -> None:
    before = outside()
    try:
        first = history(call)
        second = history(call)
        row = {"first": first, "second": second, "outside_growth": outside() - before, "outside": outside()}
        if timed:
            row["seconds"] = seconds(call)
    except Exception as error:
        row = {"error": str(error)[:300]}
    ROWS[name] = row
    print(name, row, file=sys.stderr)


@torch.no_grad()
def probe_device() -> None:
    """Names, versions and what is in use before and after CUDA has started."""
    import os

    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    info0 = pynvml.nvmlDeviceGetMemoryInfo(handle)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    ROWS["device"] = {
        "name": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "total_mem_get_info": torch.cuda.mem_get_info()[1],
        "nvml_total": info0.total,
        "nvml_used_before": info0.used,
        "nvml_used_after_init": pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "processes": [(p.pid, p.usedGpuMemory) for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)],
        "pid": os.getpid(),
        "outside_after_init": outside(),
        "cudnn": torch.backends.cudnn.version(),
    }
    print(ROWS["device"], file=sys.stderr)


def probe_products(dev: str) -> None:
    """Matrix products and attention in the three dtypes."""
    for dtype, tag in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        a = torch.randn(1024, 1536, device=dev, dtype=dtype)
        w = torch.randn(1536, 1536, device=dev, dtype=dtype)
        b = torch.randn(1536, device=dev, dtype=dtype)
        o = torch.empty(1024, 1536, device=dev, dtype=dtype)
        probe(f"addmm_out_{tag}", partial(torch.addmm, b, a, w.t(), out=o))
        probe(f"addmm_{tag}", partial(torch.addmm, b, a, w.t()))
        probe(f"linear_{tag}", partial(F.linear, a, w, b))
        probe(f"mm_{tag}", partial(torch.mm, a, w.t()))
        for lq, lk, h in ((4096, 32760, 12), (4096, 512, 12), (32760, 32760, 12)):
            q = torch.randn(lq, h, 128, device=dev, dtype=dtype)
            k = torch.randn(lk, h, 128, device=dev, dtype=dtype)

            def attend(q: torch.Tensor = q, k: torch.Tensor = k) -> torch.Tensor:
                q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, k))
                return F.scaled_dot_product_attention(q, k, v)

            if dtype is torch.float32 and lq > 5000:
                continue
            probe(f"sdpa_{tag}_{lq}x{lk}x{h}", attend, timed=True)
        ROWS[f"sdpa_strides_{tag}"] = list(attend().stride())


def probe_convolutions(dev: str) -> None:
    """The VAE's convolutions in channels_last_3d."""
    for c, hh, ww, t in ((96, 480, 832, 3), (192, 240, 416, 6), (384, 120, 208, 4), (384, 60, 104, 3)):
        x = torch.randn(1, c, t, hh, ww, device=dev).contiguous(memory_format=torch.channels_last_3d)
        wt = torch.randn(c, c, 3, 3, 3, device=dev).contiguous(memory_format=torch.channels_last_3d)
        bias = torch.randn(c, device=dev)
        probe(
            f"conv3d_cl_{c}_{t}x{hh}x{ww}",
            partial(F.conv3d, x, wt, bias, padding=(0, 1, 1)),
            timed=True,
        )
        w1 = torch.randn(c, c, 1, 3, 3, device=dev).contiguous(memory_format=torch.channels_last_3d)
        probe(
            f"conv3d_133_{c}_{t}x{hh}x{ww}",
            partial(F.conv3d, x, w1, bias, padding=(0, 1, 1)),
            timed=True,
        )
        w2 = torch.randn(2 * c, c, 3, 1, 1, device=dev).contiguous(memory_format=torch.channels_last_3d)
        probe(f"conv3d_311_{c}_{t}x{hh}x{ww}", partial(F.conv3d, x, w2), timed=True)
        y = F.conv3d(x, wt, bias, padding=(0, 1, 1))
        ROWS[f"conv_out_cl_{c}"] = y.is_contiguous(memory_format=torch.channels_last_3d)
    x = torch.randn(1, 96, 3, 480, 832, device=dev).contiguous(memory_format=torch.channels_last_3d)
    w3 = torch.randn(3, 96, 3, 3, 3, device=dev).contiguous(memory_format=torch.channels_last_3d)
    probe("conv3d_to_rgb", partial(F.conv3d, x, w3, padding=(0, 1, 1)), timed=True)
    x3 = torch.randn(1, 3, 3, 480, 832, device=dev).contiguous(memory_format=torch.channels_last_3d)
    w4 = torch.randn(96, 3, 3, 3, 3, device=dev).contiguous(memory_format=torch.channels_last_3d)
    probe("conv3d_from_rgb", partial(F.conv3d, x3, w4, padding=(0, 1, 1)), timed=True)


def probe_full_size(dev: str) -> None:
    """Attention and the first product of the FFN of the 14B model at 720P, whole and in row chunks."""
    q = torch.randn(75600, 40, 128, device=dev, dtype=torch.bfloat16)
    for rows in (75600, 18900, 9450, 4725):
        qq = q[:rows].transpose(0, 1).unsqueeze(0)
        kk = q.transpose(0, 1).unsqueeze(0)
        probe(f"sdpa_14B_{rows}", partial(F.scaled_dot_product_attention, qq, kk, kk), timed=True)
    ww = torch.randn(13824, 5120, device=dev, dtype=torch.bfloat16)
    bb = torch.randn(13824, device=dev, dtype=torch.bfloat16)
    for rows in (75600, 18900, 9450, 4725, 2400):
        a = q.view(75600, 5120)[:rows]
        probe(f"up_14B_{rows}", partial(torch.addmm, bb, a, ww.t()), timed=True)


def main() -> None:
    probe_device()
    probe_products("cuda")
    probe_convolutions("cuda")
    probe_full_size("cuda")
    json.dump(ROWS, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

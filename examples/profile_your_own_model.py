"""Where the memory of any PyTorch model goes: base memory, activation memory per stage, peak. On CUDA and on CPU.

    python examples/profile_your_own_model.py [OUTPUT_DIR]

Writes memory_events.json (valid JSON even if the process is killed) and memory_log.json into OUTPUT_DIR, by default a
new temporary folder; files that are there stay, and the new ones are numbered.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import nn

from wanvram import MemoryProfiler


def main(output_dir: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with MemoryProfiler("my-model", output_dir) as profiler:
        base = profiler.allocated_bytes()
        model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).to(device)
        profiler.log_event("model_load", {"base_memory": base})  # 8 MiB of float32 weights

        with torch.no_grad(), profiler.stage("forward"):  # peak over what was there when the stage began
            model(torch.randn(4096, 512, device=device))

        profiler.log_event("total")  # highest since the profiling began
        for event in profiler.events:
            print(event["memory_log"])
        forward = profiler.stages[0]
        print(f"forward: {forward.activation_bytes / 2**20:.1f} MiB of activations")
    print(f"written: {profiler.save_events()}, {profiler.memory_tracker.save_logs()}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="wanvram-"))

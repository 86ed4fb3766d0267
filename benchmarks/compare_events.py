"""The predicted and the real allocator event streams side by side: finds the operation behind a prediction error.

    python benchmarks/compare_events.py tests/configs/baseline.yaml --frames 17 --steps 2

Needs a CUDA device. Prints the first differences with the simulated operation's name and the Python line that allocated on the GPU.
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wanvram.config import RunConfig, load_config
from wanvram.predict.simulate import simulate
from wanvram.run.execute import Output, execute


def real_events(config: RunConfig) -> list[tuple[int, str]]:
    torch.cuda.memory._record_memory_history(max_entries=5_000_000, stacks="python")
    record = execute(replace(config, device="cuda"), Output(None))
    if record.failure is not None:
        raise SystemExit(str(record.failure))
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)
    sign = {"alloc": 1, "free_completed": -1}
    return [(sign[e["action"]] * e["size"], _line(e)) for e in trace if e["action"] in sign]


def _line(event: dict[str, Any]) -> str:
    frames = [f for f in event.get("frames", []) if "wanvram" in f["filename"]]
    return " < ".join(f"{Path(f['filename']).name}:{f['line']}" for f in frames[:3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--load_strategy")
    parser.add_argument("--show", type=int, default=40)
    args = parser.parse_args()
    config = load_config(args.config)
    request = replace(
        config.request,
        frame_num=args.frames or config.request.frame_num,
        sample_steps=args.steps or config.request.sample_steps,
    )
    strategy = replace(
        config.strategy,
        offload=args.offload or config.strategy.offload,
        load_strategy=args.load_strategy or config.strategy.load_strategy,
    )
    config = replace(config, request=request, strategy=strategy)
    real = real_events(config)
    _, memory = simulate(replace(config, device="simulated"), keep_events=True)
    predicted = [(e.nbytes, e.operation) for e in memory.events or []]
    print(f"{len(predicted)} predicted, {len(real)} real events")
    matcher = difflib.SequenceMatcher(None, [p for p, _ in predicted], [r for r, _ in real], autojunk=False)
    shown = 0
    if len(real) > 20000:
        matcher = difflib.SequenceMatcher(
            None, [p for p, _ in predicted[:20000]], [r for r, _ in real[:20000]], autojunk=False
        )
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal" or shown >= args.show:
            continue
        shown += 1
        print(f"{tag} predicted[{a}:{b}] real[{c}:{d}]")
        for size, operation in predicted[a : min(b, a + 6)]:
            print(f"    predicted {size:>14,}  {operation}")
        for size, line in real[c : min(d, c + 6)]:
            print(f"    real      {size:>14,}  {line}")
    print(f"equal share {matcher.ratio():.6f}")


if __name__ == "__main__":
    main()

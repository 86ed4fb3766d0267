"""wanvram beside diffusers on the same GPU, same shapes, random bf16 weights: one denoising step and one VAE decode each.

    python benchmarks/beside_diffusers.py --task 1.3B            832x480, 81 frames
    python benchmarks/beside_diffusers.py --task 14B             1280x720, 81 frames; two minutes for each transformer on an H200
    python benchmarks/beside_diffusers.py --only dit             some parts

Each (library, part) runs in a fresh process, with everything resident. "act" is the peak of allocated bytes minus what was allocated when
the step began; a step is both guidance forwards, ours without the embeddings, which a run makes once; `first` is the first of the
process, compiling and library loading in it, `seconds` the median of the next, at least three. The VAE is float32 for both, its first
call decodes three latent frames; diffusers' transformer runs eager and with its blocks compiled. "device" is NVML's peak of the whole
GPU less what it was before the part, read every 10 ms by the parent process. Exit code 1 where a part fails, or ours is slower or
takes more activations than the faster of diffusers' forms.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fit_card import Sampler
from provenance import conclude, header, unused

if TYPE_CHECKING:
    from own_parts import OwnParts

SHAPES = {"1.3B": (21, 60, 104), "14B": (21, 90, 160)}
REPEATS = {"1.3B": 5, "14B": 3}


def timed(call: Any, repeats: int) -> dict[str, Any]:
    """The first call, then the median wall time of the next and their peak over what was there before."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    call(warm=True)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(warm=False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "first_seconds": first,
        "seconds": median(times),
        "all_seconds": times,
        "base_mib": before / 2**20,
        "activation_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
        "reserved_mib": torch.cuda.max_memory_reserved() / 2**20,
    }


def fill(module: Any) -> None:
    import torch

    for p in list(module.parameters()) + list(module.buffers()):
        if p.is_floating_point():
            p.data.normal_(0, 0.02)
        del p
    torch.cuda.synchronize()


def diffusers_dit(task: str, *, compiled: bool = False) -> dict[str, Any]:
    import torch
    from diffusers import WanTransformer3DModel

    heads, layers, ffn = (12, 30, 8960) if task == "1.3B" else (40, 40, 13824)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = WanTransformer3DModel(num_attention_heads=heads, num_layers=layers, ffn_dim=ffn).eval()
    torch.set_default_dtype(torch.float32)
    for name, child in model.named_modules():
        if any(part in name for part in ("time_embedder", "norm1", "norm2", "norm3")):
            child.float()
    for name, p in model.named_parameters():
        if "scale_shift_table" in name:
            p.data = p.data.float()
    fill(model)
    if compiled:
        model.compile_repeated_blocks()
    f, h, w = SHAPES[task]
    latent = torch.randn(1, 16, f, h, w, device="cuda", dtype=torch.bfloat16)
    text = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    t = torch.tensor([500], device="cuda")

    def step(warm: bool) -> None:
        del warm
        for _ in range(2):
            model(hidden_states=latent, timestep=t, encoder_hidden_states=text, return_dict=False)

    return timed(step, REPEATS[task])


def our_dit(task: str) -> dict[str, Any]:
    step = own_parts(task).denoiser(500, guided=False)
    return timed(lambda warm: step(SHAPES[task][0]), REPEATS[task])


def own_parts(task: str) -> OwnParts:
    from own_parts import OwnParts

    from wanvram.config import Strategy

    return OwnParts(f"t2v-{task}", SHAPES[task], Strategy(precision="bf16"), "cuda")


def diffusers_vae(task: str) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKLWan

    with torch.device("cuda"):
        model = AutoencoderKLWan().eval()
    fill(model)
    f, h, w = SHAPES[task]
    z = torch.randn(1, 16, f, h, w, device="cuda")
    return timed(lambda warm: model.decode(z[:, :, :3] if warm else z, return_dict=False), REPEATS[task])


def our_vae(task: str) -> dict[str, Any]:
    decode = own_parts(task).decoder()
    return timed(lambda warm: decode(3 if warm else SHAPES[task][0]), REPEATS[task])


# Ours first: it was the one that missing time cut off.
PARTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "our_dit": our_dit,
    "diffusers_dit_compiled": partial(diffusers_dit, compiled=True),
    "diffusers_dit": diffusers_dit,
    "our_vae": our_vae,
    "diffusers_vae": diffusers_vae,
}


def breaches_of(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Where a part failed, and where diffusers is better."""
    found = [f"{part}: {row['error'].strip().splitlines()[-1:]}" for part, row in rows.items() if "error" in row]
    for what in ("dit", "vae"):
        theirs = [row for part, row in rows.items() if part.startswith(f"diffusers_{what}") and "error" not in row]
        ours = rows.get(f"our_{what}", {"error": ""})
        if not theirs or "error" in ours:
            continue
        best = min(theirs, key=lambda row: row["seconds"])
        worse = [figure for figure in ("seconds", "activation_mib") if ours[figure] > best[figure]]
        found += [f"{what}: {figure} {ours[figure]:.3f}, diffusers {best[figure]:.3f}" for figure in worse]
    return found


def fused_attention_version() -> str | None:
    """Ours takes it where it is installed."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def row_of(part: str, task: str) -> dict[str, Any]:
    """A part in a fresh process, with what the card lost meanwhile."""
    sampler = Sampler()
    command = [sys.executable, __file__, "--task", task, "--part", part]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    device_mib = sampler.close() / 2**20
    if result.returncode:
        return {"error": result.stderr[-1500:]}
    return dict(json.loads(result.stdout.splitlines()[-1])) | {"device_mib": device_mib}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(SHAPES), default="1.3B")
    parser.add_argument("--part", choices=sorted(PARTS), help="one of them, in this process")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    if args.part:
        import torch

        with torch.no_grad():
            row = PARTS[args.part](args.task)
        print(json.dumps(row | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))
        return 0
    rows: dict[str, dict[str, Any]] = {}
    about = header("beside_diffusers.py", "own_parts.py") | {"diffusers": importlib.metadata.version("diffusers")}
    about["flash-attn-4"] = fused_attention_version()
    args.out.mkdir(parents=True, exist_ok=True)
    target = unused(args.out / f"{datetime.date.today().isoformat()}_beside_diffusers_{args.task}.json")
    for part in (part for part in PARTS if args.only in part):
        rows[part] = row_of(part, args.task)
        print(part, rows[part], flush=True)
        target.write_text(json.dumps(about | rows | {"breaches": breaches_of(rows)}, indent=1) + "\n")
    return conclude({"parts": len(rows), "breaches": breaches_of(rows)})


if __name__ == "__main__":
    sys.exit(main())

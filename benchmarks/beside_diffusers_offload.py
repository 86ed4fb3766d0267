"""wanvram streamed beside diffusers with group offload and a tiled VAE: one denoising step and one VAE decode each.

    python benchmarks/beside_diffusers_offload.py                     both cases, every part
    python benchmarks/beside_diffusers_offload.py --only 14B          one case
    python benchmarks/beside_diffusers_offload.py --only our_vae      some parts
    python benchmarks/beside_diffusers_offload.py --tiny              a minute or two on the CPU: does it run at all?

Needs diffusers and accelerate, whose `send_to_device` its group offload calls. Every (case, part) is a fresh process with random
weights: bfloat16 for the transformers, float32 for the VAE. A step is both guidance forwards and their combination, without
the solver. One call on a third of the frames warms up; then the cache is emptied and the timed calls begin (seconds: their
median). All peaks are of the timed calls alone: allocated and reserved by PyTorch, device by NVML for the whole GPU, read
every 10 ms by the parent process, less what it reported before the part began, so that the CUDA context is in it.

diffusers streams from RAM pinned beforehand (low_cpu_mem_usage=False). With record_stream, which it documents as the faster,
the host may run ahead of the computation, and weights not yet freed pile up; the `_sync` parts are without. Its decode ends with
float32 frames on the device, ours with uint8 frames on the host; its residual stream is bfloat16, ours float32. `_compiled` has
its blocks compiled, `_640` its VAE in tiles as large as ours. Exit code 1 where a part fails, or where one setting of diffusers is
both faster and takes less of the card than ours with the same allocator. Writes <out>/<date>_<gpu>_beside_diffusers_offload.json; parts
already in that file stay unless they are measured again, and `calls` says of what code each call was.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from beside_diffusers import SHAPES, fill
from fit_card import MIB, Sampler
from nvml_watch import gpu_of
from provenance import conclude, header

if TYPE_CHECKING:
    from own_parts import Call, OwnParts

    from wanvram.engine.components import ModelSpecs

TIMESTEP, GUIDANCE = 500, 5.0


@dataclass(frozen=True)
class Case:
    """`shape`: latent frames, rows, columns. `tile`: edge of our VAE tiles in latent pixels. On the CPU the models are tiny."""

    task: str
    shape: tuple[int, int, int]
    repeats: int
    tile: int = 80
    device: str = "cuda"
    expandable_segments: bool = False

    def specs(self) -> ModelSpecs:
        from wanvram.engine.components import model_specs

        return model_specs(self.task, tiny=self.device == "cpu")


CASES = {
    "1.3B-832x480": Case("t2v-1.3B", SHAPES["1.3B"], repeats=5),
    "14B-1280x720": Case("t2v-14B", SHAPES["14B"], repeats=3),
}
TINY = {"tiny": Case("t2v-1.3B", (2, 8, 40), repeats=2, tile=20, device="cpu")}


# --- diffusers ---------------------------------------------------------------------------------------------------------------


def offloaded_transformer(case: Case, offload_type: str, *, record_stream: bool) -> Any:
    """Built on the device, where random numbers are fast; the offload then moves every weight to pinned RAM."""
    import torch
    from diffusers import WanTransformer3DModel

    spec = case.specs().dit
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(case.device):
        model = WanTransformer3DModel(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            num_layers=spec.num_layers,
            ffn_dim=spec.ffn_dim,
            freq_dim=spec.freq_dim,
            text_dim=spec.text_dim,
        ).eval()
    torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        if set(name.split(".")) & set(model._keep_in_fp32_modules):  # the rule of from_pretrained
            p.data = p.data.float()
    on_gpu = case.device == "cuda"
    if on_gpu:
        fill(model)
    model.enable_group_offload(
        onload_device=torch.device(case.device),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
        use_stream=on_gpu,  # refused for the CPU
        record_stream=record_stream and on_gpu,
        low_cpu_mem_usage=False,
    )
    return model


def diffusers_dit(case: Case, offload_type: str, *, record_stream: bool = True, compiled: bool = False) -> Call:
    import torch

    model = offloaded_transformer(case, offload_type, record_stream=record_stream)
    if compiled:
        model.compile_repeated_blocks()
    latent = torch.randn(1, 16, *case.shape, device=case.device, dtype=torch.bfloat16)
    texts = [
        torch.randn(1, 512, model.config.text_dim, device=case.device, dtype=torch.bfloat16)
        for _ in ("positive", "negative")
    ]
    t = torch.tensor([TIMESTEP], device=case.device)

    def step(frames: int) -> None:
        cond, uncond = (
            model(hidden_states=latent[:, :, :frames], timestep=t, encoder_hidden_states=text, return_dict=False)[0]
            for text in texts
        )
        uncond + GUIDANCE * (cond - uncond)

    return step


def diffusers_vae_tiled(case: Case, tile: int | None = None) -> Call:
    """tile: edge in pixels, of which three quarters are its own, as by default of 256."""
    import torch
    from diffusers import AutoencoderKLWan

    with torch.device(case.device):
        model = AutoencoderKLWan(base_dim=case.specs().vae.dim).eval()
    if case.device == "cuda":
        fill(model)
    if tile is None:
        model.enable_tiling()
    else:
        own = tile * 3 // 4
        model.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=own,
            tile_sample_stride_width=own,
        )
    z = torch.randn(1, 16, *case.shape, device=case.device)

    def decode(frames: int) -> None:
        model.decode(z[:, :, :frames], return_dict=False)

    return decode


# --- wanvram -----------------------------------------------------------------------------------------------------------------


def own_parts(case: Case, strategy: dict[str, Any]) -> OwnParts:
    from own_parts import OwnParts

    from wanvram.config import Strategy

    how = Strategy(precision="bf16", load_strategy="block", expandable_segments=case.expandable_segments, **strategy)
    return OwnParts(case.task, case.shape, how, case.device)


def our_dit(case: Case, cfg: str) -> Call:
    """cfg: sequential, one forward after the other, or joint, both through each streamed unit: half the copies."""
    return own_parts(case, {"cfg": cfg}).denoiser(TIMESTEP)


def our_vae(case: Case, *, tiled: bool) -> Call:
    return own_parts(case, {"vae_tile": case.tile if tiled else None}).decoder()


PARTS: dict[str, Callable[[Case], Call]] = {
    "our_dit": partial(our_dit, cfg="sequential"),
    "our_vae_tiled": partial(our_vae, tiled=True),
    "our_vae_whole": partial(our_vae, tiled=False),
    "our_dit_joint": partial(our_dit, cfg="joint"),
    "diffusers_dit_leaf": partial(diffusers_dit, offload_type="leaf_level"),
    "diffusers_dit_block": partial(diffusers_dit, offload_type="block_level"),
    "diffusers_vae_tiled": diffusers_vae_tiled,
    "diffusers_dit_leaf_sync": partial(diffusers_dit, offload_type="leaf_level", record_stream=False),
    "diffusers_dit_block_sync": partial(diffusers_dit, offload_type="block_level", record_stream=False),
    "diffusers_dit_leaf_compiled": partial(diffusers_dit, offload_type="leaf_level", compiled=True),
    "diffusers_dit_block_compiled": partial(diffusers_dit, offload_type="block_level", compiled=True),
    "diffusers_vae_tiled_640": partial(diffusers_vae_tiled, tile=640),
}


# --- one part in its process -------------------------------------------------------------------------------------------------


def run_here(case: Case, part: str) -> None:
    """Sets up and warms up, says READY, waits for a line from the parent, measures, says DONE with the figures."""
    import torch

    cuda = torch.cuda if case.device == "cuda" else None
    with torch.no_grad():
        call, frames = PARTS[part](case), case.shape[0]
        call(1 + frames // 3)
        gc.collect()
        if cuda:
            cuda.synchronize()
            cuda.empty_cache()
        print("READY", flush=True)
        sys.stdin.readline()
        if cuda:
            cuda.reset_peak_memory_stats()
        times = []
        for _ in range(case.repeats):
            start = time.perf_counter()
            call(frames)
            if cuda:
                cuda.synchronize()
            times.append(time.perf_counter() - start)
    figures = {
        "seconds": median(times),
        "all_seconds": times,
        "allocated_bytes": cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": cuda.max_memory_reserved() if cuda else None,
        "torch": torch.__version__,
    }
    print("DONE " + json.dumps(figures), flush=True)


def measure(case: Case, name: str, part: str) -> dict[str, Any]:
    """The part's figures, or {"error": the end of what it wrote}. A Sampler for the timed calls starts at READY."""
    before = sampled() if case.device == "cuda" else None
    command = [sys.executable, __file__, "--here", name, part]
    command += ["--expandable_segments"] if case.expandable_segments else []
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if case.expandable_segments else {}
    row: dict[str, Any] = {}
    timed: Sampler | None = None
    with tempfile.TemporaryFile("w+") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command, env=os.environ | environment, **pipes)
        assert process.stdout is not None
        assert process.stdin is not None
        for line in process.stdout:
            kind, _, text = line.partition(" ")
            if kind.strip() == "READY":
                timed = Sampler() if before is not None else None
                process.stdin.write("\n")
                process.stdin.flush()
            elif kind == "DONE":
                row = json.loads(text)
        if timed is not None:
            timed.close()
        if process.wait() != 0 or not row:
            errors.seek(0)
            return {"error": errors.read()[-1500:] or f"exit status {process.returncode}"}
    row["nvml_bytes"] = timed.highest - before if timed is not None and before is not None else None
    return row


def sampled() -> int:
    """Bytes NVML reports as used on the GPU now, by whatever process."""
    sampler = Sampler()
    sampler.close()
    return sampler.idle


# --- all parts ---------------------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    """From NVML: asking PyTorch would make a CUDA context in this process, which would be measured with every part."""
    if device == "cpu":
        return "CPU"
    import pynvml

    pynvml.nvmlInit()
    name = pynvml.nvmlDeviceGetName(gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES")))
    return name.decode() if isinstance(name, bytes) else str(name)


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['case']:14s} {row['part']:26s} FAILED: {row['error'].strip().splitlines()[-1]}", flush=True)
        return
    peaks = (row[f"{q}_bytes"] for q in ("nvml", "allocated", "reserved"))
    cells = " ".join("        -" if peak is None else f"{peak / MIB:9.0f}" for peak in peaks)
    print(f"{row['case']:14s} {row['part']:26s} {row['seconds']:9.3f} {cells}", flush=True)


def breaches_of(rows: list[dict[str, Any]]) -> list[str]:
    """Where a part failed, and where one setting of diffusers is better in both."""
    found = [f"{row['case']}/{row['part']} failed" for row in rows if "error" in row]
    good = [row for row in rows if "error" not in row]
    for ours in good:
        what = {"our_dit": "dit", "our_vae_tiled": "vae"}.get(ours["part"])
        for row in good if what else ():
            same = all(row[key] == ours[key] for key in ("case", "expandable_segments"))
            smaller = (row["nvml_bytes"] or 0) < (ours["nvml_bytes"] or 0)
            if same and smaller and row["part"].startswith(f"diffusers_{what}") and row["seconds"] < ours["seconds"]:
                found.append(f"{row['case']}: {row['part']} is faster and smaller than {ours['part']}")
    return found


def store(target: Path, device: str, row: dict[str, Any]) -> list[str]:
    """Adds the row to the file, in place of one of the same case, part and allocator setting; what is broken now.

    `calls`: of what code and machine each call was that put rows here.
    """
    identity = ("case", "part", "expandable_segments")
    before = json.loads(target.read_text()) if target.exists() else {"parts": [], "calls": []}
    rows = [other for other in before["parts"] if any(other[key] != row[key] for key in identity)] + [row]
    about = header("beside_diffusers_offload.py", "own_parts.py")
    calls = [call for call in before.get("calls", ()) if call["source_sha256"] != about["source_sha256"]] + [about]
    document = {
        "device": device,
        "date": str(datetime.date.today()),
        "calls": calls,
        "breaches": breaches_of(rows),
        "parts": rows,
    }
    target.write_text(json.dumps(document, indent=1) + "\n")
    return breaches_of(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts whose <case>/<part> contains one of these, comma separated")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further part after this many seconds")
    parser.add_argument("--expandable_segments", action="store_true", help="of PyTorch's allocator, for every part")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU; no memory is measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--here", nargs=2, metavar=("CASE", "PART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    missing = [name for name in ("diffusers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} cannot be imported: install what is missing, or put it on PYTHONPATH")
    return args


def main() -> int:
    args = parse()
    if args.here:
        name, part = args.here
        run_here(replace((CASES | TINY)[name], expandable_segments=args.expandable_segments), part)
        return 0
    cases = TINY if args.tiny else CASES
    chosen = [(c, p) for c in cases for p in PARTS if any(word in f"{c}/{p}" for word in args.only.split(","))]
    if not chosen:
        sys.exit(f"--only {args.only} leaves nothing of {', '.join(cases)} with {', '.join(PARTS)}")
    device = device_name("cpu" if args.tiny else "cuda")
    common = {
        "diffusers": importlib.metadata.version("diffusers"),
        "expandable_segments": args.expandable_segments,
    }
    short = device.removeprefix("NVIDIA ").split()[0].lower()
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"{datetime.date.today()}_{short}_beside_diffusers_offload.json"
    print(f"{device}; peaks in MiB\n{'case':14s} {'part':26s}   seconds      NVML allocated  reserved", flush=True)
    start, breaches = time.monotonic(), ["nothing was measured"]
    for name, part in chosen:
        if time.monotonic() - start > args.seconds:
            print(f"{name:14s} {part:26s} not started: {args.seconds:g} s are over", flush=True)
            continue
        row = (
            {"case": name, "part": part}
            | common
            | measure(replace(cases[name], expandable_segments=args.expandable_segments), name, part)
        )
        show(row)
        breaches = store(target, device, row)
    return conclude({"parts": len(chosen), "breaches": breaches})


if __name__ == "__main__":
    sys.exit(main())

"""How far is a low-precision forward of the transformer from float32: ours and diffusers', with the same weights?

    python benchmarks/numerics.py --model tiny 1.3B --device cuda
    python benchmarks/numerics.py --model tiny --device cpu

Random float32 weights; the reference is our float32 forward (TF32 off), which equals diffusers' float32 forward to the figure in the
column `fp32`. `sliced` is ours with attention_slicing: the same sums, rounded elsewhere. Errors are relative to the reference: the
largest (max |a - r| / max |r|) and the root mean square. diffusers runs as its pipelines run it: `model.to(dtype)` with its
`_keep_in_fp32_modules` kept in float32. Exit code 1 where
 float32 differs by over 1e-5, or ours is further away than diffusers. Writes <out>/<date>_<device>_numerics.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from provenance import conclude, header, unused

from wanvram.models.dit import Condition, WanDiT
from wanvram.models.precision import PRECISIONS
from wanvram.specs import DIT, DiTSpec
from wanvram.weights.diffusers import TABLES, official_names
from wanvram.weights.random import RandomSource

SPECS = {"tiny": "tiny-t2v", "1.3B": "t2v-1.3B"}
SHAPES = {"tiny": (5, 12, 20), "1.3B": (9, 30, 52)}  # latent frames, rows, columns
MOST_FP32_ERROR = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights_of(spec: DiTSpec) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {k: tuple(p.shape) for k, p in WanDiT(spec, PRECISIONS["fp32"]).state_dict().items()}
    source, weights = RandomSource(shapes, 0), {}
    for key, shape in shapes.items():
        weights[key] = torch.empty(shape)
        source.fill(key, weights[key])
        if key.endswith("bias"):
            weights[key].normal_(std=0.02, generator=torch.Generator().manual_seed(len(key)))
    return weights


def inputs_of(shape: tuple[int, ...], spec: DiTSpec, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(16, *shape, generator=generator)
    return latent.to(device), torch.randn(40, spec.text_dim, generator=generator).to(device)


def ours(
    spec: DiTSpec, weights: dict[str, torch.Tensor], precision: str, inputs: Any, device: str, *, sliced: bool = False
) -> torch.Tensor:
    """sliced: attention in four groups of heads, as attention_slicing does."""
    model = WanDiT(spec, PRECISIONS[precision]).to(device)
    model.load_state_dict(weights)
    latent, context = inputs
    heads = max(1, spec.num_heads // 4) if sliced else None
    (velocity,) = model.forward(latent, 500, [Condition(context)], rows_per_chunk=2048, heads_per_group=heads)
    return velocity.double().cpu()


def theirs(spec: DiTSpec, weights: dict[str, torch.Tensor], precision: str, inputs: Any, device: str) -> torch.Tensor:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=spec.num_heads,
        attention_head_dim=spec.head_dim,
        num_layers=spec.num_layers,
        ffn_dim=spec.ffn_dim,
        text_dim=spec.text_dim,
        freq_dim=spec.freq_dim,
    ).eval()
    names = official_names(model.state_dict(), TABLES["dit"])
    model.load_state_dict({parts[0]: weights[official] for official, parts in names.items()})
    model.to(device=device, dtype=DTYPES[precision])
    for name, module in model.named_modules():
        if any(part in name.split(".") for part in model._keep_in_fp32_modules or ()):
            module.float()
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in model._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.float()
    latent, context = inputs
    text = torch.zeros(1, 512, spec.text_dim, device=device, dtype=DTYPES[precision])
    text[0, : context.shape[0]] = context
    with torch.no_grad():
        out: torch.Tensor = model(
            latent[None].to(DTYPES[precision]), torch.tensor([500], device=device), text, return_dict=False
        )[0]
    return out[0].double().cpu()


def error(a: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    difference = a - reference
    return {
        "max": (difference.abs().max() / reference.abs().max()).item(),
        "rms": (difference.square().mean().sqrt() / reference.square().mean().sqrt()).item(),
    }


def breaches_of(row: dict[str, Any]) -> list[str]:
    """In float32 both agree to 1e-5; below it ours, whole or in slices, is no further away than diffusers' is."""
    name, found = f"{row['model']} {row['precision']}", []
    for figure in ("max", "rms"):
        ours, theirs = max(row[way][figure] for way in ("ours", "sliced")), row["diffusers"][figure]
        if row["precision"] == "fp32":
            if max(ours, theirs) > MOST_FP32_ERROR:
                found.append(f"{name}: {figure} {max(ours, theirs):.1e}, at most {MOST_FP32_ERROR}")
        elif ours > theirs:
            found.append(f"{name}: {figure} {ours:.1e}, diffusers {theirs:.1e}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny"], choices=sorted(SPECS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar="N", help="latent frames, rows, columns (default: by model)"
    )
    parser.add_argument("--precision", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    rows = []
    for model in args.model:
        spec = DIT[SPECS[model]]
        weights, inputs = weights_of(spec), inputs_of(tuple(args.shape or SHAPES[model]), spec, args.device)
        reference = ours(spec, weights, "fp32", inputs, args.device)
        for precision in args.precision:
            row = {"model": model, "precision": precision}
            row["ours"] = error(ours(spec, weights, precision, inputs, args.device), reference)
            row["sliced"] = error(ours(spec, weights, precision, inputs, args.device, sliced=True), reference)
            row["diffusers"] = error(theirs(spec, weights, precision, inputs, args.device), reference)
            rows.append(row)
            figures = (f"{k} max {row[k]['max']:.2e} rms {row[k]['rms']:.2e}" for k in ("ours", "sliced", "diffusers"))
            print(f"{model:5s} {precision}: {'; '.join(figures)}", flush=True)
    breaches = [breach for row in rows for breach in breaches_of(row)]
    document = header("numerics.py") | {
        "device": name,
        "shapes": {model: args.shape or SHAPES[model] for model in args.model},
        "breaches": breaches,
        "rows": rows,
    }
    key = "cpu" if args.device == "cpu" else name.split()[-1].lower()
    unused(args.out / f"{datetime.date.today()}_{key}_numerics.json").write_text(json.dumps(document, indent=1) + "\n")
    return conclude({"rows": len(rows), "breaches": breaches})


if __name__ == "__main__":
    sys.exit(main())

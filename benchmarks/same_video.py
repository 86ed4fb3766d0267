"""Does every way to hold the weights give the same video at full size? Latents and frames against the resident run's, bit for bit.

    python benchmarks/same_video.py /tmp/wan-1.3B --task t2v-1.3B          a checkpoint (benchmarks/random_checkpoint.py)
    python benchmarks/same_video.py /tmp/wan-14B --task t2v-14B --without_text
    python benchmarks/same_video.py random --task t2v-14B --without_text   without a checkpoint: weights made on the host
    python benchmarks/same_video.py tiny --device cpu                      tries the script anywhere: 5 frames, 832*64

One process; T5, --steps steps and the VAE at 832*480. --without_text gives random contexts instead of T5's, which saves loading it five
times; --without_text still denoises and decodes. The values compared are the latents (float32) and the frames (of 255); the whole VAE
is used by all ways but the last. Slices and tiles give cuBLAS and cuDNN other shapes, for which they round elsewhere; with --precision
fp32, which also turns TF32 off, what is left is the order of sums. Exit code 1 where a way without slices or tiles is not equal bit for
bit, where in fp32 the tiles are not or slices move a latent by over 1e-4 of the largest, or where in half precision either moves the
latents by over 2 % of the largest or the frames by over 1 of 255 on average. Writes <out>/<date>_<gpu>_same_video_<task>_<precision>.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import conclude, header, unused

from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.pipeline import Pipeline
from wanvram.media.inputs import prepare_inputs
from wanvram.recorder.recorder import Recorder
from wanvram.run.execute import make_device
from wanvram.run.weights import GeneratedWeights, choose_weights
from wanvram.weights.random import RandomSource
from wanvram.weights.sources import TensorSource

STREAMED = Strategy(load_strategy="block", offload=True, expandable_segments=True)
WAYS = {
    "resident": Strategy(offload=True, expandable_segments=True),
    "pinned": STREAMED,
    "pinned, 4 blocks resident": replace(STREAMED, resident_blocks=4),
    "pageable": replace(STREAMED, weights_in="pageable"),
    "disk": replace(STREAMED, weights_in="disk"),
    "pinned, joint guidance": replace(STREAMED, cfg="joint"),
    "pinned, attention in slices": replace(STREAMED, attention_slicing=True),
    "pinned, tiled VAE": replace(STREAMED, vae_tile=52),
}


class FromHost(RandomSource):
    """Random numbers made on the host, wherever they go: a GPU draws others."""

    def fill(self, key: str, dest: torch.Tensor) -> None:
        made = torch.empty(dest.shape, dtype=dest.dtype)
        super().fill(key, made)
        dest.copy_(made)


class HostWeights(GeneratedWeights):
    def source(self, component: str) -> TensorSource:
        return FromHost(self._shapes[component], self.seed)


class Kept(Pipeline):
    """Keeps the latents and frames; without_text gives random contexts."""

    without_text = False
    latent: torch.Tensor
    frames: list[torch.Tensor]

    def encode_text(self, parts: Parts) -> list[torch.Tensor]:
        if not self.without_text:
            return super().encode_text(parts)
        generator = self.device.generator(2)
        shape = (77, parts.specs.text_encoder.dim)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": self.device.torch_device, "generator": generator}
        return [torch.randn(shape, **options) for _ in range(2)]

    def decode_all(self, parts: Parts, latents: list[torch.Tensor], open_sink: Any) -> None:
        self.latent = latents[0].cpu()
        super().decode_all(parts, latents, open_sink)

    def write(self, frames: torch.Tensor) -> None:
        self.frames.append(frames.clone())

    def finish(self) -> None:
        """Nothing is written."""

    @contextmanager
    def sink(self, index: int) -> Iterator[Kept]:
        self.frames = []
        yield self


def run(strategy: Strategy, args: argparse.Namespace) -> dict[str, Any]:
    strategy = replace(strategy, precision=args.precision)
    size = "832*64" if args.weights == "tiny" else "832*480"
    request = Request.for_task(args.task, size=size, frame_num=args.frames, sample_steps=args.steps, base_seed=1)
    weights = str(args.weights)
    config = RunConfig("same_video", "", args.device, replace(request, prompt="a prompt"), strategy, weights=weights)
    gc.collect()
    device, start = make_device(config), time.monotonic()
    device.empty_cache()
    with device.session():
        device.meter.reset_peak()
        made = weights in ("random", "tiny")
        source = (
            HostWeights(1, tiny=weights == "tiny")
            if made
            else choose_weights(weights, simulated=False, task=args.task, seed=1)
        )
        inputs, _ = prepare_inputs(config.request, simulated=False, real_weights=False)
        pipeline = Kept(config, device, Recorder(device.meter, None, None), source, inputs)
        pipeline.without_text = args.without_text
        pipeline.run(pipeline.sink)
    peak = max(span.peak.allocated_bytes for span in pipeline.recorder.spans)
    return {"latent": pipeline.latent, "frames": torch.cat(pipeline.frames), "peak_allocated_bytes": peak,
            "seconds": time.monotonic() - start}  # fmt: skip


def compared(result: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    latent, frames = (result[k].double() - plain[k].double() for k in ("latent", "frames"))
    return {
        "latents_equal": torch.equal(result["latent"], plain["latent"]),
        "largest_latent_difference": latent.abs().max().item(),
        "largest_latent": plain["latent"].abs().max().item(),
        "frames_equal": torch.equal(result["frames"], plain["frames"]),
        "largest_frame_difference": frames.abs().max().item(),
        "mean_frame_difference": frames.abs().mean().item(),
    } | {key: result[key] for key in ("peak_allocated_bytes", "seconds")}


def breaches_of(row: dict[str, Any], precision: str) -> list[str]:
    """A sentence where a way is further from the resident run than it may be."""
    way, exact = row["way"], precision == "fp32"
    moved = row["largest_latent_difference"] / row["largest_latent"]
    if "slices" in way:
        wrong = moved > (1e-4 if exact else 0.02) or row["mean_frame_difference"] > (0.01 if exact else 1.0)
    elif "tiled" in way:
        wrong = not row["latents_equal"] or (not row["frames_equal"] if exact else row["mean_frame_difference"] > 1.0)
    else:
        wrong = not (row["latents_equal"] and row["frames_equal"])
    said = f"latents by {moved:.1e} of the largest, frames by {row['mean_frame_difference']:.2g} of 255"
    return [f"{way}: not the resident run's video: {said}"] if wrong else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="checkpoint directory, or tiny")
    parser.add_argument("--task", default="t2v-1.3B")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--frames", type=int, help="default: 17; tiny: 5")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", default="bf16", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--without_text", action="store_true")
    parser.add_argument("--only", default="", help="ways whose name contains one of these, comma separated")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    args.frames = args.frames or (5 if args.weights == "tiny" else 17)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    name = f"{datetime.date.today()}_{device.split()[-1].lower()}_same_video_{args.task}_{args.precision}.json"
    target, breaches = unused(args.out / name), []
    about = header("same_video.py") | {"device": device}
    if args.precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    plain, rows = run(WAYS["resident"], args), []
    print(f"{device}, {args.task}: resident in {plain['seconds']:.1f} s", flush=True)
    for name, strategy in list(WAYS.items())[1:]:
        no_files = args.weights == "random" and strategy.weights_in == "disk"
        if no_files or not any(part in name for part in args.only.split(",")):
            continue
        row = {"way": name} | compared(run(strategy, args), plain)
        rows.append(row)
        breaches += breaches_of(row, args.precision)
        print(
            f"{name:28s} latents {'equal' if row['latents_equal'] else 'differ'}, at most {row['largest_latent_difference']:.2e} "
            f"of {row['largest_latent']:.2f}; frames {'equal' if row['frames_equal'] else 'differ'}, at most "
            f"{row['largest_frame_difference']:.0f} of 255; {row['peak_allocated_bytes'] / 2**20:.0f} MiB, {row['seconds']:.1f} s",
            flush=True,
        )
        document = about | {"task": args.task, "precision": args.precision, "frames": args.frames, "steps": args.steps,
                            "without_text": args.without_text, "breaches": breaches, "rows": rows}  # fmt: skip
        target.write_text(json.dumps(document, indent=1) + "\n")
    return conclude({"ways": len(rows), "breaches": breaches})


if __name__ == "__main__":
    sys.exit(main())

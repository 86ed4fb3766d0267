"""Requests and budgets at random for keep_promise.py, as the words that a person types, and the pictures and videos they name.

Case i depends on the seed, on i and on the range of budgets alone, so several calls add up to one series.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wanvram.specs import DIT
from wanvram.tasks import TASKS

__all__ = ["Case", "Media", "draw", "expected_seconds", "typed", "write_media"]

GIB = 2**30
LEAST_BUDGET_GIB = 2.0
MOST_FRAMES = 81
LIMIT_SECONDS = 4.0
LONG_SECONDS = 15.0
LONG_EVERY = 8  # one case in so many may take LONG_SECONDS
STEPS = 2
MATRIX_FLOPS = 5e14  # per second, of an H100 in bf16 over whole blocks
DECODE_SECONDS = 8e-8  # per pixel of every frame, of the VAE's decoder on an H100; its encoder counts the same
FRAME_RATES = (16, 24, 25, 30)
PROMPTS = (
    "a cat on a skateboard",
    "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage.",
    "雨后的街道，霓虹灯倒映在积水里，一个撑红伞的人慢慢走远",
    "the camera circles a lighthouse at dusk, waves break on the rocks, gulls pass in front of the lamp, " * 6,
)


@dataclass(frozen=True)
class Media:
    """A file of a request. kind: picture, video or mask (a video, white where the source is to be remade)."""

    flag: str
    kind: str
    name: str
    width: int
    height: int
    frames: int = 1
    fps: int = 16


@dataclass(frozen=True)
class Case:
    """One command. frames None: not typed, because the task makes one picture or the source video decides.

    drawn_frames: of the first draw, if that was longer than limit_seconds allow. expected_seconds: see expected_seconds().
    """

    index: int
    task: str
    size: str
    frames: int | None
    budget: str
    precision: str | None
    base_seed: int
    prompt: str
    media: tuple[Media, ...]
    limit_seconds: float
    expected_seconds: float
    drawn_frames: int | None

    @property
    def budget_bytes(self) -> int:
        return int(float(self.budget.removesuffix("GiB")) * GIB)


def draw(
    seed: int,
    index: int,
    card_bytes: int,
    limit: float = LIMIT_SECONDS,
    budget_gib: Sequence[float] | None = None,
) -> Case:
    """Tasks come in shuffled rounds of all seven. Only frames give way to the limit: they are drawn again among those within it.

    budget_gib: [lowest, highest] budget, drawn log-uniformly; None: from 2 GiB to what the card has.
    """
    rng = random.Random(f"{seed}/{index}")
    tasks = sorted(TASKS)
    random.Random(f"{seed}/round {index // len(tasks)}").shuffle(tasks)
    task = tasks[index % len(tasks)]
    width, height = map(int, rng.choice(TASKS[task].sizes).split("*"))
    lowest, highest = budget_gib or (LEAST_BUDGET_GIB, card_bytes / GIB)
    budget = lowest * (highest / lowest) ** rng.random()
    case = Case(
        index=index,
        task=task,
        size=f"{width}*{height}",
        frames=None,
        budget=f"{math.floor(budget * 10) / 10:.1f}GiB",
        precision=rng.choice((None, "bf16", "fp16")),
        base_seed=rng.randrange(2**31),
        prompt=rng.choice(PROMPTS).strip(),
        media=(),
        limit_seconds=LONG_SECONDS if index % LONG_EVERY == LONG_EVERY - 1 else limit,
        expected_seconds=0.0,
        drawn_frames=None,
    )
    return _with_frames(replace(case, media=_media(rng, TASKS[task].kind, width, height)), rng)


def _media(rng: random.Random, kind: str, width: int, height: int) -> tuple[Media, ...]:
    """Of any aspect ratio and size. A source video has no frames yet."""
    if kind == "i2v":
        return (_picture(rng, "--image", "image"),)
    if kind == "flf2v":
        return (_picture(rng, "--first_frame", "first"), _picture(rng, "--last_frame", "last"))
    if kind != "vace":
        return ()
    way = rng.choice(("text", "references", "video", "video and mask", "video, mask and references"))
    media = []
    if "video" in way:
        columns, rows = _sides(rng, width * height * rng.uniform(0.4, 1.5))
        source = Media("--src_video", "video", "source.mp4", columns, rows, fps=rng.choice(FRAME_RATES))
        media.append(source)
        if "mask" in way:
            media.append(replace(source, flag="--src_mask", kind="mask", name="mask.mp4"))
    if "references" in way:
        media += [_picture(rng, "--src_ref_images", f"reference{number}") for number in range(rng.randint(1, 3))]
    return tuple(media)


def _picture(rng: random.Random, flag: str, stem: str) -> Media:
    width, height = _sides(rng, 10 ** rng.uniform(5, 6.3))
    return Media(flag, "picture", f"{stem}.{rng.choice(('png', 'jpg', 'webp'))}", width, height)


def _sides(rng: random.Random, pixels: float) -> tuple[int, int]:
    """Even ones, as H.264 wants them, of an aspect ratio between 1:2.2 and 2.2:1."""
    aspect = 2.2 ** rng.uniform(-1, 1)
    return 2 * round(math.sqrt(pixels * aspect) / 2), 2 * round(math.sqrt(pixels / aspect) / 2)


def _with_frames(case: Case, rng: random.Random) -> Case:
    if TASKS[case.task].frames == 1:
        return replace(case, expected_seconds=expected_seconds(case, 1))
    counts = range(5 if TASKS[case.task].kind == "flf2v" else 1, MOST_FRAMES + 1, 4)
    drawn = rng.choice(counts)
    within = [count for count in counts if expected_seconds(case, count) <= case.limit_seconds] or [counts[0]]
    frames = drawn if drawn in within else rng.choice(within)
    spare = rng.randint(0, 3)  # a source has any number of frames, of which 4n+1 are used
    media = tuple(m if m.kind == "picture" else replace(m, frames=frames + spare) for m in case.media)
    return replace(
        case,
        media=media,
        frames=None if any(m.flag == "--src_video" for m in media) else frames,
        expected_seconds=expected_seconds(case, frames),
        drawn_frames=None if frames == drawn else drawn,
    )


def expected_seconds(case: Case, frames: int) -> float:
    """GPU seconds of two steps and the VAE, from arithmetic alone and roughly: to keep requests short, not to be judged."""
    spec = DIT[TASKS[case.task].dit]
    pixels = math.prod(map(int, case.size.split("*")))
    source = next((m for m in case.media if m.flag == "--src_video"), None)
    if source is not None:  # the video is never larger than its source
        pixels = min(pixels, source.width * source.height)
    references = sum(m.flag == "--src_ref_images" for m in case.media)
    tokens = pixels // 256 * (1 + (frames - 1) // 4 + references)
    blocks = spec.num_layers + len(spec.vace_layers)
    products = 2 * tokens * (6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim) * blocks
    attention = 4 * tokens**2 * spec.dim * blocks
    passes = {"t2v": 1, "t2i": 1, "i2v": 2, "flf2v": 2, "vace": 3}[TASKS[case.task].kind]
    vae = pixels * frames * DECODE_SECONDS * passes
    return 2 * STEPS * (products + attention) / MATRIX_FLOPS + vae  # both guidance passes of every step


def typed(case: Case, output: str = "run", budget: str | None = None) -> list[str]:
    """`wanvram generate ...`, to be typed where the media are. budget: instead of the case's own."""
    words = ["wanvram", "generate", "--task", case.task, "--size", case.size]
    if case.frames is not None:
        words += ["--frame_num", str(case.frames)]
    words += ["--sample_steps", str(STEPS), "--base_seed", str(case.base_seed), "--ckpt_dir", "random"]
    words += ["--prompt", case.prompt]
    flags: dict[str, list[str]] = {}
    for media in case.media:
        flags.setdefault(media.flag, []).append(media.name)
    for flag, names in flags.items():
        words += [flag, ",".join(names)]
    if case.precision is not None:
        words += ["--precision", case.precision]
    return [*words, "--vram_budget", budget or case.budget, "-o", output]


def write_media(case: Case, directory: Path) -> None:
    """Every file of the case; the same bytes of noise and shapes for the same case."""
    rng = np.random.default_rng(case.base_seed)
    for media in case.media:
        if media.kind == "picture":
            _write_picture(directory / media.name, media, rng)
        else:
            _write_video(directory / media.name, media, rng)


def _write_picture(path: Path, media: Media, rng: np.random.Generator) -> None:
    _blobs(media.width, media.height, rng).save(path)


def _blobs(width: int, height: int, rng: np.random.Generator) -> Any:
    """A Pillow image of soft coloured patches."""
    from PIL import Image

    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _write_video(path: Path, media: Media, rng: np.random.Generator) -> None:
    """The patches drifting by; of a mask a white box that moves across black."""
    import av

    still = np.asarray(_blobs(media.width, media.height, rng))
    if media.kind == "mask":
        still = np.zeros_like(still)
        still[: media.height // 2, : media.width // 2] = 255
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=media.fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = media.width, media.height, "yuv420p"
        for number in range(media.frames):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 8 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

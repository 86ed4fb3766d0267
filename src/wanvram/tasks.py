"""The seven tasks with the official script's sizes and defaults. No torch.

Source: official `generate.py` and its configuration tables, checked against tests/golden/facts.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

__all__ = ["TASKS", "Task", "are_frames_valid", "latent_shape", "normal_size", "picture_size"]

_COMMON_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_P720 = ("720*1280", "1280*720")
_P480 = ("480*832", "832*480")


@dataclass(frozen=True)
class Task:
    """Defaults of one task. `dit` is the key of its transformer in specs.DIT. sizes are "width*height"."""

    name: str
    dit: str
    sizes: tuple[str, ...]
    frames: int
    steps: int
    shift: float
    shift_480p: float
    guide_scale: float
    solver: str
    negative_prompt: str

    @property
    def kind(self) -> str:
        """t2v, t2i, i2v, flf2v or vace: what it makes a video from."""
        return self.name.partition("-")[0]

    @property
    def default_size(self) -> str:
        """Landscape: the official script's 1280*720 where the task supports it, else 832*480."""
        return self.sizes[1]

    def default_shift(self, size: str) -> float:
        return self.shift_480p if size in _P480 else self.shift


def _task(
    name: str,
    sizes: tuple[str, ...],
    *,
    steps: int = 50,
    shift: float = 5.0,
    shift_480p: float | None = None,
    before: str = "",
) -> Task:
    """`before` goes in front of the common negative prompt. shift_480p None: the same at every size."""
    return Task(
        name=name,
        dit=name,
        sizes=sizes,
        frames=1 if name.startswith("t2i") else 81,
        steps=steps,
        shift=shift,
        shift_480p=shift if shift_480p is None else shift_480p,
        guide_scale=5.0,
        solver="unipc",
        negative_prompt=before + _COMMON_NEGATIVE,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("t2v-1.3B", _P480),
        _task("t2v-14B", _P720 + _P480),
        _task("t2i-14B", (*_P720, *_P480, "1024*1024")),
        _task("i2v-14B", _P720 + _P480, steps=40, shift_480p=3.0, before="镜头晃动，"),
        _task("flf2v-14B", _P720 + _P480, shift=16.0, before="镜头切换，镜头晃动，"),
        _task("vace-1.3B", _P480, shift=16.0),
        _task("vace-14B", _P720 + _P480, shift=16.0),
    )
}


def normal_size(task: str, text: str) -> str:
    """`832x480` and `480p` as the official script writes them, `832*480`; 480p is the task's landscape size of 480 rows.

    What is no size of the task comes back as it is, for the check that names those it has.
    """
    spelled = text.strip().lower().replace("x", "*")
    for size in TASKS[task].sizes if task in TASKS else ():
        width, height = size.split("*")
        if spelled == size or (spelled == f"{height}p" and int(width) > int(height)):
            return size
    return text


def are_frames_valid(frames: int) -> bool:
    """The VAE takes the first frame alone and then four at a time: 4n+1."""
    return frames >= 1 and frames % 4 == 1


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Video of frames x height x width pixels -> latent [16, (frames-1)/4 + 1, height/8, width/8]."""
    return 16, (frames - 1) // 4 + 1, height // 8, width // 8


def picture_size(area: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) of a video of at most `area` pixels in the aspect ratio of a picture, in multiples of 16.

    Float64 in the official order of operations: at a border case another order gives another size.
    """
    aspect = height / width
    rows = int(sqrt(area * aspect) // 8 // 2 * 2)
    columns = int(sqrt(area / aspect) // 8 // 2 * 2)
    return columns * 8, rows * 8

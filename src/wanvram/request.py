"""What to generate: one Request, with the official defaults of its task. No torch.

Every error is one InputError sentence that begins with the key or flag and says what is allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from wanvram.errors import require
from wanvram.knobs import MAX_VIDEOS
from wanvram.specs import Geometry
from wanvram.tasks import TASKS, Task, normal_size

__all__ = ["Request", "Video", "is_unicode", "prompt_fault"]

MAX_PROMPT_CHARACTERS = 20_000
LEAST_SHIFT, MOST_SHIFT = 0.01, 100  # official shifts are 3 to 16; at 1e-16 the noise levels divide by zero
MAX_GUIDE_SCALE = 1000
# Tiny weights make videos of any size in whole tokens, so that a first try takes seconds.
_SIDES = re.compile(r"([1-9][0-9]{1,3})\*([1-9][0-9]{1,3})")
MAX_TINY_SIDE = 1280
MAX_FRAMES = 4093  # 1024 latent frames: as far as the official transformer's positions go
EXTEND_METHODS = ("local_qwen", "dashscope")
# What a task does not read is refused rather than ignored. File -> what its tasks are called.
MEDIA = {name: task.kind for task in TASKS.values() for name in task.reads}


@dataclass(frozen=True)
class Video:
    """One of those that a run makes. prompt: its number among the request's, from 0. seed: of its noise."""

    prompt: int
    seed: int


@dataclass(frozen=True)
class Request:
    """What to generate. size is "width*height" in pixels; base_seed -1 draws a random one.

    prompts: several in one run, instead of `prompt`; each gets the same seed, as in a run of its own.
    prompt_extend_optional: go on with the prompt as it is if extending fails (ours, not official).
    """

    task: str
    size: str
    frame_num: int
    sample_steps: int
    sample_shift: float
    sample_guide_scale: float
    sample_solver: str
    base_seed: int
    prompt: str
    negative_prompt: str
    prompts: tuple[str, ...] = ()
    image: str | None = None
    first_frame: str | None = None
    last_frame: str | None = None
    src_video: str | None = None
    src_mask: str | None = None
    src_ref_images: tuple[str, ...] = ()
    use_prompt_extend: bool = False
    prompt_extend_method: str = "local_qwen"
    prompt_extend_model: str | None = None
    prompt_extend_target_lang: str = "zh"
    prompt_extend_optional: bool = False

    def __post_init__(self) -> None:
        require(self.task in TASKS, f"task: '{self.task}' is unknown; choose one of {', '.join(TASKS)}")
        self._check_shape()
        self._check_sampling()
        self._check_prompts()
        self._check_media()

    def _check_shape(self) -> None:
        task, stride = self.facts, self.geometry.strides[0]
        self.check_size(tiny=True)  # RunConfig, which knows the weights, asks again
        require(
            self.geometry.are_frames_valid(self.frame_num),
            f"frame_num: {self.frame_num} is not of the form {stride}n+1 (1, {1 + stride}, {1 + 2 * stride}, ..., 81)",
        )
        require(self.frame_num <= MAX_FRAMES, f"frame_num: {self.frame_num}; at most {MAX_FRAMES} frames in one video")
        require(
            not task.makes_picture or self.frame_num == 1,
            f"frame_num: {self.task} makes one image; frame_num must be 1",
        )
        require(
            self.frame_num >= task.least_frames,
            f"frame_num: {task.kind} needs at least {task.least_frames}, the first and last differ",
        )

    def check_size(self, *, tiny: bool) -> None:
        """InputError unless the task makes videos of this size; with tiny weights any in whole tokens will do."""
        sizes = self.facts.sizes
        sides = _SIDES.fullmatch(self.size) if tiny else None
        token = self.geometry.token_side
        whole = sides is not None and all(n % token == 0 and n <= MAX_TINY_SIDE for n in map(int, sides.groups()))
        require(
            whole or self.size in sizes,
            f"size: '{self.size}' is not supported by {self.task}; choose {', '.join(sizes)}",
        )

    def _check_sampling(self) -> None:
        require(1 <= self.sample_steps <= 1000, f"sample_steps: {self.sample_steps} is outside 1..1000")
        require(
            LEAST_SHIFT <= self.sample_shift <= MOST_SHIFT,
            f"sample_shift: {self.sample_shift!s:.40} is outside {LEAST_SHIFT}..{MOST_SHIFT}",
        )
        require(
            -MAX_GUIDE_SCALE <= self.sample_guide_scale <= MAX_GUIDE_SCALE,
            f"sample_guide_scale: {self.sample_guide_scale!s:.40} is outside -{MAX_GUIDE_SCALE}..{MAX_GUIDE_SCALE}",
        )
        require(
            self.sample_solver in ("unipc", "dpm++"), f"sample_solver: '{self.sample_solver}'; choose unipc or dpm++"
        )
        require(-1 <= self.base_seed < 2**63, f"base_seed: {self.base_seed} is outside -1..2^63-1")

    def _check_prompts(self) -> None:
        require(len(self.prompts) <= MAX_VIDEOS, f"prompts: {len(self.prompts)}; at most {MAX_VIDEOS} in one run")
        require(not (self.prompt and self.prompts), "prompts: given together with prompt; give one of them")
        texts = [("prompt", self.prompt), ("negative_prompt", self.negative_prompt)]
        for name, text in texts + [("prompts", text) for text in self.prompts]:
            fault = prompt_fault(text)
            require(fault is None, f"{name}: {fault}")
        require(
            self.prompt_extend_method in EXTEND_METHODS,
            f"prompt_extend_method: '{self.prompt_extend_method}'; choose {' or '.join(EXTEND_METHODS)}",
        )
        require(
            self.prompt_extend_target_lang in ("zh", "en"),
            f"prompt_extend_target_lang: '{self.prompt_extend_target_lang}'; choose zh or en",
        )

    def _check_media(self) -> None:
        task = self.facts
        for name, reader in MEDIA.items():
            require(
                not _listed(getattr(self, name)) or name in task.reads,
                f"{name}: {self.task} does not read it; only {reader} does",
            )
            for path in _listed(getattr(self, name)):
                require(path != "", f"{name}: is empty; give a file")
                require(is_unicode(path), f"{name}: {path!a} is not a UTF-8 file name; rename the file")
        require(self.src_mask is None or self.src_video is not None, "src_mask: needs src_video, whose parts it marks")
        missing = [name for name in task.pictures if getattr(self, name) is None]
        require(
            len(missing) in (0, len(task.pictures)),
            f"{', '.join(task.pictures)}: only one is given; {task.kind} needs both",
        )

    @classmethod
    def for_task(cls, task: str, **given: Any) -> Request:
        """The task's official defaults, overridden by every given value that is not None; size also as 832x480 or 480p."""
        require(task in TASKS, f"task: '{task}' is unknown; choose one of {', '.join(TASKS)}")
        values = {name: value for name, value in given.items() if value is not None}
        defaults = TASKS[task]
        size = normal_size(task, values.pop("size", defaults.default_size))
        base: dict[str, Any] = {
            "size": size,
            "frame_num": defaults.frames,
            "sample_steps": defaults.steps,
            "sample_shift": defaults.default_shift(size),
            "sample_guide_scale": defaults.guide_scale,
            "sample_solver": defaults.solver,
            "base_seed": -1,
            "prompt": "",
            "negative_prompt": defaults.negative_prompt,
        }
        return cls(task=task, **(base | values))

    @property
    def guided(self) -> bool:
        """Whether the negative prompt has a say: with scale 1 the velocity is that of the prompt alone."""
        return self.sample_guide_scale != 1

    @property
    def facts(self) -> Task:
        """What is true of its task, whatever is asked for."""
        return TASKS[self.task]

    @property
    def geometry(self) -> Geometry:
        return self.facts.family.geometry

    @property
    def width(self) -> int:
        return int(self.size.split("*")[0])

    @property
    def height(self) -> int:
        return int(self.size.split("*")[1])

    def video_size(self, picture: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the video made from a picture of that (width, height): its aspect ratio, this size's area."""
        return self.geometry.picture_size(self.width * self.height, *picture)

    def all_prompts(self) -> tuple[str, ...]:
        return self.prompts or (self.prompt,)

    def videos(self, together: int) -> tuple[Video, ...]:
        """One per prompt, all with the same seed; of a single prompt as many as are made together, with seeds one apart."""
        prompts = self.all_prompts()
        if len(prompts) > 1:
            return tuple(Video(prompt, self.base_seed) for prompt in range(len(prompts)))
        return tuple(Video(0, self.base_seed + number) for number in range(together))


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The file names given; an empty one counts, to be refused rather than ignored."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def prompt_fault(text: str) -> str | None:
    """Why no model is given this text as a prompt, if so."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        return f"{len(text)} characters; at most {MAX_PROMPT_CHARACTERS} (the model reads 512 tokens)"
    return None if is_unicode(text) else "is not UTF-8 text"


def is_unicode(text: str) -> bool:
    """Bytes of a command line that are no UTF-8 reach Python as lone surrogates, which no file can hold."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)

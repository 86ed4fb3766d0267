"""The model family that is known, its components, and its seven tasks with the official script's sizes and defaults. No torch.

Everything that is true of Wan2.1 and of no other model is here and in specs.py; all else asks.
Source: official `generate.py` and its configuration tables, checked against tests/golden/facts.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wanvram.specs import WAN21_GEOMETRY, Geometry

__all__ = ["TASKS", "WAN21", "Family", "Model", "Part", "Task", "latent_shape", "normal_size", "picture_size"]

_COMMON_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_P720 = ("720*1280", "1280*720")
_P480 = ("480*832", "832*480")
_ENDS = ("first_frame", "last_frame")
_SOURCE = ("src_video", "src_mask", "src_ref_images")


@dataclass(frozen=True)
class Model:
    """A component. kind: which class computes it (text_encoder, image_encoder, dit or vae).

    spec, tiny: its keys in specs; a transformer's is its task's. files, folder: where the official download and a Diffusers
    folder have it. above: of several transformers, the noise level (timestep / 1000) down to which it is this one's turn.
    """

    name: str
    kind: str
    spec: str
    files: tuple[str, ...]
    folder: str
    tiny: str = "tiny"
    above: float = 0.0


@dataclass(frozen=True)
class Part:
    """What a run loads and releases as one: a component or, of the VAE, the half that a stage uses. needed: by which tasks."""

    name: str
    component: str
    needed: Callable[[Task], bool] = lambda task: True


@dataclass(frozen=True)
class Family:
    """Models that work together. components: in the order of checkpoints; parts: in the order of the stages that use them."""

    name: str
    geometry: Geometry
    components: tuple[Model, ...]
    parts: tuple[Part, ...]

    def component_of(self, name: str) -> Model:
        """Of a component or a part of one, by its name."""
        owner = next((part.component for part in self.parts if part.name == name), name)
        return next(model for model in self.components if model.name == owner)

    @property
    def transformers(self) -> tuple[Model, ...]:
        """They take turns, the one for the most noise first."""
        return tuple(model for model in self.components if model.kind == "dit")

    def turn(self, timestep: float) -> Model:
        """The transformer whose step this is; timestep: 0 to 1000."""
        return next(model for model in self.transformers if timestep >= 1000 * model.above)


@dataclass(frozen=True)
class Task:
    """Facts and defaults of one task. `dit` is the key of its transformer in specs.DIT. sizes are "width*height".

    pictures: the files it makes a video from, by their keys. reads: all files that it may be given.
    """

    name: str
    family: Family
    dit: str
    sizes: tuple[str, ...]
    frames: int
    steps: int
    shift: float
    shift_480p: float
    guide_scale: float
    solver: str
    negative_prompt: str
    pictures: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """t2v, t2i, i2v, flf2v or vace: what people call it by."""
        return self.name.partition("-")[0]

    @property
    def makes_picture(self) -> bool:
        """One picture instead of a video."""
        return self.frames == 1

    @property
    def takes_source(self) -> bool:
        """It changes a video, or starts from nothing (VACE)."""
        return "src_video" in self.reads

    @property
    def encodes_video(self) -> bool:
        """Frames go through the VAE before denoising."""
        return bool(self.pictures) or self.takes_source

    @property
    def least_frames(self) -> int:
        """Of a first and a last picture each begins a latent frame of its own."""
        return self.family.geometry.video_frames(max(1, len(self.pictures)))

    def parts(self) -> tuple[Part, ...]:
        """What it needs of its family, in the order of the stages."""
        return tuple(part for part in self.family.parts if part.needed(self))

    def components(self) -> tuple[Model, ...]:
        """Those that it needs, in the order of checkpoints."""
        needed = {part.component for part in self.parts()}
        return tuple(model for model in self.family.components if model.name in needed)

    @property
    def default_size(self) -> str:
        """Landscape: the official script's 1280*720 where the task supports it, else 832*480."""
        return self.sizes[1]

    def default_shift(self, size: str) -> float:
        return self.shift_480p if size in _P480 else self.shift


WAN21 = Family(
    name="Wan2.1",
    geometry=WAN21_GEOMETRY,
    components=(
        Model("text_encoder", "text_encoder", "umt5-xxl", ("models_t5_umt5-xxl-enc-bf16.pth",), "text_encoder"),
        Model(
            "image_encoder",
            "image_encoder",
            "vit-h-14",
            ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
            "image_encoder",
        ),
        Model(
            "dit",
            "dit",
            "",
            ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
            "transformer",
        ),
        Model("vae", "vae", "wan2.1", ("Wan2.1_VAE.pth",), "vae"),
    ),
    parts=(
        Part("text_encoder", "text_encoder"),
        Part("image_encoder", "image_encoder", lambda task: bool(task.pictures)),
        Part("vae_encoder", "vae", lambda task: task.encodes_video),
        Part("dit", "dit"),
        Part("vae_decoder", "vae"),
    ),
)
latent_shape, picture_size = WAN21_GEOMETRY.latent_shape, WAN21_GEOMETRY.picture_size


def _task(
    name: str,
    sizes: tuple[str, ...],
    *,
    steps: int = 50,
    shifts: tuple[float, float] = (5.0, 5.0),
    before: str = "",
    pictures: tuple[str, ...] = (),
    reads: tuple[str, ...] = (),
) -> Task:
    """`before` goes in front of the common negative prompt. shifts: in general, at 480P."""
    return Task(
        name=name,
        family=WAN21,
        dit=name,
        sizes=sizes,
        frames=1 if name.startswith("t2i") else 81,
        steps=steps,
        shift=shifts[0],
        shift_480p=shifts[1],
        guide_scale=5.0,
        solver="unipc",
        negative_prompt=before + _COMMON_NEGATIVE,
        pictures=pictures,
        reads=pictures + reads,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("t2v-1.3B", _P480),
        _task("t2v-14B", _P720 + _P480),
        _task("t2i-14B", (*_P720, *_P480, "1024*1024")),
        _task("i2v-14B", _P720 + _P480, steps=40, shifts=(5.0, 3.0), before="镜头晃动，", pictures=("image",)),
        _task("flf2v-14B", _P720 + _P480, shifts=(16.0, 16.0), before="镜头切换，镜头晃动，", pictures=_ENDS),
        _task("vace-1.3B", _P480, shifts=(16.0, 16.0), reads=_SOURCE),
        _task("vace-14B", _P720 + _P480, shifts=(16.0, 16.0), reads=_SOURCE),
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

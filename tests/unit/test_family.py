"""A model family's facts are said once: every size follows from them, and a second family needs nothing but its own facts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.predict.simulate import simulate
from wanvram.record import RunRecord
from wanvram.specs import CLIP, DIT, T5, VAE, WAN21_GEOMETRY, DiTSpec, Geometry, VAESpec
from wanvram.tasks import TASKS, WAN21, Family, Model, Part
from wanvram.units import MIB
from wanvram.weights.diffusers import FOLDERS
from wanvram.weights.official import COMPONENTS

SOURCE = Path(__file__).parents[2] / "src" / "wanvram"
Register = Callable[[Geometry, tuple[Model, ...]], None]
OTHER = Geometry(latent_channels=8, strides=(2, 4, 4), patch=(1, 4, 4))


@pytest.mark.parametrize("name", DIT)
def test_every_transformer_has_the_geometry_of_its_family(name: str) -> None:
    spec, geometry = DIT[name], WAN21_GEOMETRY
    assert (spec.patch_size, spec.out_dim) == (geometry.patch, geometry.latent_channels)
    extra = geometry.image_channels if spec.has_image_branch else 0
    assert (spec.in_dim, spec.vace_in_dim) == (geometry.latent_channels + extra, geometry.source_channels)


@pytest.mark.parametrize("name", VAE)
def test_every_vae_has_the_geometry_of_its_family(name: str) -> None:
    spec = VAE[name]
    assert (spec.z_dim, spec.strides) == (WAN21_GEOMETRY.latent_channels, WAN21_GEOMETRY.strides)
    assert len(spec.latent_mean) == len(spec.latent_std) == spec.z_dim


def test_components_parts_and_checkpoint_tables_name_the_same_things() -> None:
    names = [model.name for model in WAN21.components]
    assert list(COMPONENTS) == list(FOLDERS) == names
    assert {part.component for part in WAN21.parts} == set(names)
    for model in WAN21.components:
        registry = {"text_encoder": T5, "image_encoder": CLIP, "vae": VAE}.get(model.kind)
        assert registry is None or {model.spec, model.tiny} <= registry.keys()


def test_a_task_needs_the_parts_that_its_files_ask_for() -> None:
    parts = {task.kind: tuple(part.name for part in task.parts()) for task in TASKS.values()}
    text = ("text_encoder", "dit", "vae_decoder")
    pictures = ("text_encoder", "image_encoder", "vae_encoder", "dit", "vae_decoder")
    assert parts["t2v"] == parts["t2i"] == text
    assert parts["i2v"] == parts["flf2v"] == pictures
    assert parts["vace"] == ("text_encoder", "vae_encoder", "dit", "vae_decoder")


@pytest.mark.parametrize(
    ("change", "shape", "tokens"),
    [
        ({}, (16, 21, 60, 104), 21 * 30 * 52),
        ({"latent_channels": 48}, (48, 21, 60, 104), 21 * 30 * 52),
        ({"strides": (4, 16, 16)}, (16, 21, 30, 52), 21 * 15 * 26),
        ({"strides": (8, 8, 8)}, (16, 11, 60, 104), 11 * 30 * 52),
        ({"patch": (1, 4, 4)}, (16, 21, 60, 104), 21 * 15 * 26),
    ],
)
def test_latents_and_tokens_follow_from_the_geometry(
    change: dict[str, object], shape: tuple[int, ...], tokens: int
) -> None:
    geometry = replace(WAN21_GEOMETRY, **change)  # type: ignore[arg-type]
    assert geometry.latent_shape(81, 480, 832) == shape
    assert geometry.tokens(shape) == tokens
    assert geometry.video_frames(shape[1]) == sum(geometry.pieces(81)) == 81
    width, height = geometry.picture_size(480 * 832, 300, 200)
    assert width % geometry.token_side == height % geometry.token_side == 0


def family(geometry: Geometry, transformers: tuple[Model, ...]) -> Family:
    """WAN21 with other sizes and other transformers, none of which has a checkpoint."""
    others = [replace(model, tiny="other") if model.kind == "vae" else model for model in WAN21.components]
    components = tuple(model for model in others if model.kind != "dit") + transformers
    parts = [part for part in WAN21.parts if part.component != "dit"]
    parts[-1:-1] = [Part(model.name, model.name) for model in transformers]
    return Family("made up", geometry, components, tuple(parts))


def tiny_specs(geometry: Geometry) -> tuple[DiTSpec, VAESpec]:
    """Of VAEs with as many levels as the strides need."""
    halvings = geometry.strides[1].bit_length() - 1
    temporal = geometry.strides[0].bit_length() - 1
    channels = geometry.latent_channels
    vae = replace(
        VAE["tiny"],
        z_dim=channels,
        dim_mult=(1, *[2] * halvings),
        temporal_downsample=(*[False] * (halvings - temporal), *[True] * temporal),
        latent_mean=(0.0,) * channels,
        latent_std=(1.0,) * channels,
    )
    dit = replace(DIT["tiny-t2v"], model_type="other", patch_size=geometry.patch, in_dim=channels, out_dim=channels)
    return dit, vae


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Makes a task `t2v-other` known whose family has this geometry and these transformers."""

    def add(geometry: Geometry, transformers: tuple[Model, ...]) -> None:
        dit, vae = tiny_specs(geometry)
        monkeypatch.setitem(DIT, "other", dit)
        monkeypatch.setitem(DIT, "tiny-other", dit)
        monkeypatch.setitem(VAE, "other", vae)
        task = replace(TASKS["t2v-1.3B"], name="t2v-other", dit="other", family=family(geometry, transformers))
        monkeypatch.setitem(TASKS, "t2v-other", task)

    return add


ONE = (Model("dit", "dit", "", (), ""),)
TWO = (
    Model("dit", "dit", "", (), "", above=0.875),  # high noise, the first steps
    Model("dit_low_noise", "dit", "", (), ""),
)


def simulated(frames: int = 9, prompts: tuple[str, ...] = (), **strategy: object) -> RunRecord:
    request = Request.for_task(
        "t2v-other", size="64*48", frame_num=frames, sample_steps=8, base_seed=0, prompts=prompts
    )
    config = RunConfig(
        "made up",
        "",
        "simulated",
        request,
        strategy=Strategy(**strategy),  # type: ignore[arg-type]
        measurement=Measurement(profile_memory=False),
        weights="tiny",
    )
    record, _ = simulate(config)
    assert record.failure is None, record.failure
    return record


@pytest.mark.parametrize("change", [{}, {"latent_channels": 8}, {"strides": (2, 4, 4)}, {"patch": (1, 1, 1)}])
def test_a_family_of_other_sizes_is_simulated(change: dict[str, object], register: Register) -> None:
    geometry = replace(WAN21_GEOMETRY, **change)  # type: ignore[arg-type]
    register(geometry, ONE)
    record = simulated()
    latent = geometry.latent_shape(9, 48, 64)
    (stage,) = [stage for stage in record.stages if stage.name == "denoise"]
    held = 4 * latent[0] * latent[1] * latent[2] * latent[3]  # the latent in float32, alone left after denoising
    left = stage.end.allocated_bytes - stage.start.allocated_bytes
    assert held <= left < held + 2**20


def test_more_tokens_of_a_smaller_patch_take_more_memory(register: Register) -> None:
    peaks = {}
    for patch in ((1, 2, 2), (1, 1, 1)):
        register(replace(WAN21_GEOMETRY, patch=patch), ONE)
        peaks[patch] = max(s.activation_bytes for s in simulated().stages if s.name == "denoise")
    assert peaks[1, 1, 1] > peaks[1, 2, 2]


@pytest.mark.parametrize("offload", [True, False])
def test_two_transformers_in_turn_are_loaded_used_and_released_one_after_the_other(
    offload: bool, register: Register
) -> None:
    register(OTHER, TWO)
    record = simulated(offload=offload)
    dits = [model.name for model in TWO]
    stages = [(s.name, s.component) for s in record.stages if s.name == "denoise" or s.component in dits]
    assert [component for name, component in stages if name == "denoise"] == dits
    assert {c.name for c in record.components} == {"text_encoder", "vae", *dits}
    steps = [step for s in record.stages if s.name == "denoise" for step in s.children if step.kind == "step"]
    assert [step.name for step in steps] == [f"step {number}" for number in range(8)]
    first, second = ([s.component for s in steps].count(name) for name in dits)
    assert first + second == 8
    assert first > 0 < second
    if offload:
        high, low = (next(s for s in record.stages if s.name == f"load {name}") for name in dits)
        weights = low.end.allocated_bytes - low.start.allocated_bytes
        # The first has gone: the second finds what that one found, cuBLASLt's workspace and the latents on their way.
        assert low.start.allocated_bytes - high.start.allocated_bytes - MIB < weights


def test_two_transformers_in_turn_take_every_batch_over_where_the_first_left_it(register: Register) -> None:
    register(OTHER, TWO)
    record = simulated(prompts=("a", "b", "c"), batch_size=2, micro_batch_size=2)
    dits = [model.name for model in TWO]
    denoising = [stage for stage in record.stages if stage.part == "denoise"]
    assert [(s.name, s.component, s.videos) for s in denoising] == [
        (name, dit, videos) for dit in dits for name, videos in (("denoise", 2), ("denoise 2", 1))
    ]
    numbers = [int(step.name.removeprefix("step ")) for stage in denoising for step in stage.children]
    first = numbers.index(max(numbers[: numbers.index(0, 1)])) + 1
    assert numbers == [*range(first), *range(first), *range(first, 8), *range(first, 8)]
    assert len(record.video_seconds()) == 3


def test_no_file_outside_specs_and_tasks_asks_for_a_kind_of_task_in_a_list() -> None:
    asked = re.compile(r"(kind|model_type) (not in|in|[!=]=) \(?\"(t2v|t2i|i2v|flf2v|vace)\"")
    found = [
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if path.name not in ("specs.py", "tasks.py") and asked.search(path.read_text(encoding="utf-8"))
    ]
    assert found == [], "ask for a fact of the Task or the spec instead"

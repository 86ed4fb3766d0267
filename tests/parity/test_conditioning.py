"""Image, first-last-frame and VACE conditioning, size rules and masks against the golden data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from parity.golden import assert_close, load_case, load_json
from wanvram.engine.conditions import Inputs, image_condition, vace_context
from wanvram.engine.devices import CpuDevice
from wanvram.models.conditioning import boundary_mask, cover, letterbox, squeeze, unit
from wanvram.models.vae import WanVAE
from wanvram.specs import VAESpec
from wanvram.tasks import latent_shape, picture_size

FACTS = load_json("facts")


def cases(stem: str) -> list[Any]:
    return [pytest.param(call, id=call["name"]) for call in load_case(stem).calls()]


@pytest.fixture(scope="module")
def encode() -> Callable[..., torch.Tensor]:
    """The golden VAE's encoder, as the engine hands it to the conditioning."""
    case = load_case("vae")
    config = case.config
    spec = VAESpec(
        config["dim"],
        config["z_dim"],
        tuple(config["dim_mult"]),
        config["num_res_blocks"],
        tuple(config["temperal_downsample"]),
    )
    vae = WanVAE(spec)
    vae.load_state_dict(case.weights())
    return lambda make: vae.encode(make())


def pictures(stem: str, call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    case, name = load_case(stem), call["name"]
    return tuple(case[f"input.{name}.image{i}"].to(torch.uint8) for i in range(len(call["image_sizes_hw"])))


def given(stem: str, call: dict[str, Any]) -> Inputs:
    images = pictures(stem, call)
    height, width = images[0].shape[:2]
    width, height = picture_size(call["max_area"], width, height)
    return Inputs(call["frame_num"], height, width, images)


@pytest.mark.parametrize(
    ("stem", "call"),
    [(stem, param.values[0]) for stem in ("cond_i2v", "cond_flf2v") for param in cases(stem)],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_the_image_condition_is_the_official_one(stem: str, call: dict[str, Any], encode: Any) -> None:
    case, name = load_case(stem), call["name"]
    inputs = given(stem, call)
    assert (inputs.height, inputs.width) == (call["h"], call["w"])
    first, *last = (squeeze(p, inputs.height, inputs.width) for p in inputs.boundary_pictures())
    assert_close(first, case[f"mid.{name}.first_resized"], f"{name}: first frame as the VAE sees it")
    y = image_condition(encode, CpuDevice(), inputs, torch.float32)
    golden = case[f"output.{name}.y"]
    if len({tuple(size) for size in call["image_sizes_hw"]}) == 1:
        for picture in last:
            assert_close(picture, case[f"mid.{name}.last_resized"], f"{name}: last frame as the VAE sees it")
        assert_close(y, golden, f"{name}: y")
    else:
        # Official crops a last frame of another size without scaling it (docs/differences.md). It reaches the last
        # latent frame only: everything before, and the mask, must be the same.
        assert_close(y[:, :-1], golden[:, :-1], f"{name}: y before the last frame")
        assert_close(y[:4], golden[:4], f"{name}: mask")
        assert not torch.equal(y[4:, -1], golden[4:, -1])


@pytest.mark.parametrize("call", cases("cond_vace"))
def test_the_vace_context_is_the_official_one(call: dict[str, Any], encode: Any) -> None:
    case, name = load_case("cond_vace"), call["name"]
    frames, mask = case[f"input.{name}.frames"], case[f"input.{name}.mask"][:1]
    height, width = frames.shape[2:]
    # References go through uint8 in a run; here they are given as they are, on a canvas of the video's size.
    references = tuple(case[f"input.{name}.ref{i}"][:, 0] for i in range(call["refs"]))
    chunks = lambda t: lambda: (t[:, i : i + (4 if i else 1)] for i in [0, *range(1, t.shape[1], 4)])  # noqa: E731
    inputs = Inputs(frames.shape[1], height, width, source=chunks(frames), mask=chunks(mask), references=references)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wanvram.engine.conditions.unit", lambda picture: picture)
        z = vace_context(encode, CpuDevice(), inputs, torch.float32)
    assert list(z.shape) == call["z_shape"]
    assert_close(z, case[f"output.{name}.z"], f"{name}: context")


LETTERBOXES = sorted(n.split(".")[1] for n in load_case("cond_vace").tensors if n.startswith("input.letterbox"))


@pytest.mark.parametrize("name", LETTERBOXES)
def test_a_reference_picture_is_centred_on_white(name: str) -> None:
    case = load_case("cond_vace")
    golden = case[f"output.{name}.canvas"]
    canvas = letterbox(case[f"input.{name}.ref"][:, 0], *golden.shape[2:])
    assert_close(canvas[:, None], golden, name)


@pytest.mark.parametrize("name", sorted(n for n in load_case("masks").tensors))
def test_the_mask_marks_the_given_frames(name: str) -> None:
    golden = load_case("masks")[name]
    mask = boundary_mask(*golden.shape[1:], last="flf2v" in name)
    assert_close(mask, golden, name)


@pytest.mark.parametrize(
    "example", FACTS["i2v_size_rule"]["examples"], ids=lambda e: f"{e['image_wh']}-{e['max_area']}"
)
def test_a_picture_gives_the_video_its_aspect_ratio(example: dict[str, Any]) -> None:
    width, height = picture_size(example["max_area"], *example["image_wh"])
    assert (width, height) == (example["w"], example["h"])
    _, frames, rows, columns = latent_shape(81, height, width)
    assert frames * rows * columns // 4 == example["seq_len_81"]


@pytest.mark.parametrize("call", cases("cond_i2v") + cases("cond_flf2v"))
def test_clip_sees_the_pictures_in_their_own_size(call: dict[str, Any]) -> None:
    stem = "cond_i2v" if len(call["image_sizes_hw"]) == 1 else "cond_flf2v"
    images = pictures(stem, call)
    seen = [list(p.shape) for p in given(stem, call).boundary_pictures()]
    assert seen[0] == [3, *call["image_sizes_hw"][0]]
    assert all(shape == seen[0] for shape in seen)
    if len({tuple(size) for size in call["image_sizes_hw"]}) == 1:
        assert [[3, 1, *shape[1:]] for shape in seen] == call["clip_input_shapes"]
    assert torch.equal(unit(images[0]), given(stem, call).boundary_pictures()[0])


def test_a_last_frame_of_another_size_is_scaled_to_cover_the_first_and_cropped_in_the_middle() -> None:
    picture = torch.zeros(3, 30, 60)
    picture[:, :, 20:40] = 1.0
    covered = cover(picture, 60, 40)  # scaled by 2 to 60 x 120, of which the columns 40..80 stay
    assert covered.shape == (3, 60, 40)
    assert covered[:, :, 4:-4].min() > 0.99
    assert cover(picture, 30, 60) is picture

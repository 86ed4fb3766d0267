"""Golden image features, preprocessing and full-size parameter names of the CLIP vision tower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity.golden import assert_close, load_case, load_json
from wanvram.models.clip import MEAN, STD, CLIPVision
from wanvram.specs import CLIP, CLIPSpec

CASE = load_case("clip_visual")
CALLS = {call["name"]: call for call in CASE.calls()}


def _spec() -> CLIPSpec:
    c = CASE.config
    return CLIPSpec(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        dim=c["vision_dim"],
        mlp_ratio=c["vision_mlp_ratio"],
        num_heads=c["vision_heads"],
        num_layers=c["vision_layers"],
    )


def _load(dtype: torch.dtype) -> CLIPVision:
    model = CLIPVision(_spec(), dtype)
    unused = set(model.unused_keys())
    weights = {k: t for k, t in CASE.weights().items() if k.startswith("visual.") and k not in unused}
    model.load_state_dict(weights, strict=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tower() -> CLIPVision:
    return _load(torch.float32)


def _images(name: str) -> list[Tensor]:
    return [CASE[f"input.{name}.image{i}"] for i in range(len(CALLS[name]["images"]))]


@pytest.mark.parametrize("name", CALLS)
def test_preprocessing_is_official(tower: CLIPVision, name: str) -> None:
    assert_close(tower.preprocess(_images(name)), CASE[f"mid.{name}.preprocessed"], f"{name} preprocessed")


@pytest.mark.parametrize("name", CALLS)
def test_features_are_official(tower: CLIPVision, name: str) -> None:
    assert_close(tower(tower.preprocess(_images(name))), CASE[f"output.{name}"], name)


def test_normalisation_constants_are_official() -> None:
    assert list(MEAN) == CASE.meta["preprocess"]["mean"]
    assert list(STD) == CASE.meta["preprocess"]["std"]


def test_preprocessing_leaves_an_image_of_the_right_size_unchanged(tower: CLIPVision) -> None:
    size = tower.spec.image_size
    image = torch.zeros(3, 1, size, size)
    tower.preprocess([image])
    assert not image.any()


def test_used_and_unused_keys_together_are_the_checkpoint() -> None:
    with torch.device("meta"):
        model = CLIPVision(CLIP["vit-h-14"], torch.float16)
    golden = load_json("full_size_keys")
    official = {k: s for k, s in golden["clip-full-file"]["keys"].items() if k.startswith("visual.")}
    assert sorted(model.unused_keys()) == sorted(golden["clip-visual"]["unused_by_wan"])
    used = {k: list(t.shape) for k, t in model.state_dict().items()}
    assert used == {k: s for k, s in official.items() if k not in model.unused_keys()}


def test_float16_features_stay_close_to_float32(tower: CLIPVision) -> None:
    name = next(iter(CALLS))
    pixels = tower.preprocess(_images(name))
    low = _load(torch.float16)(pixels)
    assert low.dtype == torch.float16
    full = tower(pixels)
    assert (low.float() - full).abs().max() < 0.01 * full.abs().max()

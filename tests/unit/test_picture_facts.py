"""What a viewer would see if it were wrong: colours at the ends of the scale, positions of long videos, edges of pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wanvram.engine.vae_stages import _to_uint8
from wanvram.models.conditioning import cover, letterbox
from wanvram.models.dit_blocks import ImageEmbedding
from wanvram.models.precision import FP32
from wanvram.models.rotary import rotary_tables
from wanvram.specs import DIT

HEAD_DIM = 128


def test_a_pixel_beyond_the_ends_is_black_or_white_and_never_wraps() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(3, 1, 1, 5).clone()
    assert _to_uint8(values)[0, 0].tolist() == [[v, v, v] for v in (0, 0, 127, 255, 255)]


def test_a_pixel_is_truncated_and_not_rounded_as_the_official_writer_does() -> None:
    values = torch.tensor([200.9, 1.5]).div_(127.5).sub_(1.0).view(1, 1, 1, 2).expand(3, 1, 1, 2).clone()
    assert _to_uint8(values)[0, 0, :, 0].tolist() == [200, 1]


def angles(position: Tensor, pairs: int) -> Tensor:
    """Of Wan's rotary embedding, written down again in float64: 10000^(-2i / dim) turns each step by that much."""
    dim = 2 * pairs
    return position.double()[:, None] / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@pytest.mark.parametrize("grid", [(21, 45, 80), (1024, 1, 1), (2, 80, 45)])
def test_positions_are_exact_to_float32_at_every_token_of_a_full_size_video(grid: tuple[int, int, int]) -> None:
    cos, sin = rotary_tables(grid, HEAD_DIM, "cpu")
    f, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    parts = [angles(axis.reshape(-1), pairs) for axis, pairs in ((f, 22), (h, 21), (w, 21))]
    wanted = torch.cat(parts, dim=1)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos.double() - wanted.cos()).abs().max() < 1e-7
    assert (sin.double() - wanted.sin()).abs().max() < 1e-7


def test_the_image_mlp_divides_weak_features_by_their_deviation_and_1e_5() -> None:
    """At a variance of 1e-5 an epsilon of 1e-6 would give 1.35 times as much; at the goldens' variance of 1 nothing shows."""
    spec = DIT["tiny-i2v"]
    mlp = ImageEmbedding(spec, FP32)
    norm = mlp.proj[0]
    with torch.no_grad():
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    x = torch.randn(257, spec.clip_dim, generator=torch.Generator().manual_seed(1)).mul_(1e-5**0.5)
    d = x.double() - x.double().mean(dim=1, keepdim=True)
    wanted = d / (d.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    assert (norm(x.clone()).double() - wanted).abs().max() < 1e-5


def edge(height: int, width: int) -> Tensor:
    picture = torch.full((3, height, width), -1.0)
    picture[:, :, width // 2 :] = 1.0
    return picture


@pytest.mark.parametrize("size", [(90, 160), (480, 832), (30, 30)])
def test_a_black_and_white_edge_stays_black_and_white_whatever_it_is_scaled_to(size: tuple[int, int]) -> None:
    picture = edge(270, 480)
    covered = cover(picture, *size)
    assert covered.shape == (3, *size)
    assert covered.min() == -1.0, "a bicubic that overshoots is cut"
    assert covered.max() == 1.0
    scale = max(size[0] / 270, size[1] / 480)
    rows, columns = (max(round(n * scale), least) for n, least in zip((270, 480), size, strict=True))
    whole = F.interpolate(picture[None], size=(rows, columns), mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
    assert torch.equal(covered, whole[:, top : top + size[0], left : left + size[1]])


def test_fine_stripes_made_smaller_become_grey_and_no_pattern() -> None:
    stripes = torch.ones(3, 64, 1024)
    stripes[:, :, ::2] = -1.0
    small = cover(stripes, 16, 256)
    assert small[:, :, 8:-8].abs().max() < 0.05


@pytest.mark.parametrize("shape", [(2, 4000), (4000, 2)])
def test_a_reference_of_extreme_shape_still_has_a_row_and_a_column(shape: tuple[int, int]) -> None:
    canvas = letterbox(torch.full((3, *shape), -1.0), 64, 96)
    assert canvas.shape == (3, 64, 96)
    dark = (canvas < 0).any(dim=0)
    assert dark.any(), "the picture is there"
    assert min(int(dark.any(dim=0).sum()), int(dark.any(dim=1).sum())) == 1

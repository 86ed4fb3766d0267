"""Tiles of the VAE give what the whole picture gives, at any cut, and hold one tile's caches instead of the picture's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unit.test_vae import SPEC, Calls, Storages, randn, random_vae
from wanvram.errors import InputError
from wanvram.models import vae_blocks
from wanvram.models.vae import WanVAE
from wanvram.models.vae_tiles import Halos, Stretch, grid
from wanvram.specs import VAE, VAESpec
from wanvram.units import GIB

# Other shapes than SPEC: two residual blocks a level, temporal steps elsewhere, one level fewer.
TWO_BLOCKS = VAESpec(dim=4, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True))
SHORT = VAESpec(dim=6, z_dim=16, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False))
MODELS = [random_vae(spec=spec) for spec in (SPEC, TWO_BLOCKS, SHORT)]

sizes = st.integers(1, 7)
tile_sizes = st.tuples(st.integers(1, 8), st.integers(1, 8))
seeds = st.integers(0, 2**16)


def assembled(model: WanVAE, z: Tensor, tile: tuple[int, int], **hooks: Callable[[Tensor], Tensor]) -> Tensor:
    """All pieces in one video; where a piece is missing it stays NaN."""
    frames = 1 + model.group * (z.shape[1] - 1)
    video = torch.full((3, frames, model.scale * z.shape[2], model.scale * z.shape[3]), float("nan"))
    for piece in model.decode_tiles(z, tile, **hooks):
        _, count, height, width = piece.pixels.shape
        target = video[:, piece.first_frame :, piece.top :, piece.left :][:, :count, :height, :width]
        assert target.isnan().all()
        target.copy_(piece.pixels)
    return video


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"  # NaN fails too


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(MODELS), st.sampled_from((1, 2, 3, 5)), sizes, sizes, tile_sizes, seeds)
def test_a_video_decoded_in_tiles_is_the_video_decoded_whole(
    model: WanVAE, frames: int, height: int, width: int, tile: tuple[int, int], seed: int
) -> None:
    z = randn(16, frames, height, width, seed=seed)
    assert_equal(assembled(model, z, tile), torch.cat(list(model.decode(z)), dim=1))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MODELS), st.sampled_from((1, 3, 5, 9, 17)), sizes, sizes, tile_sizes, seeds)
def test_a_video_encoded_in_tiles_is_the_video_encoded_whole(
    model: WanVAE, frames: int, height: int, width: int, tile: tuple[int, int], seed: int
) -> None:
    video = randn(3, frames, model.scale * height, model.scale * width, seed=seed)
    assert_equal(model.encode_tiles(lambda: video.split(3, dim=1), tile), model.encode([video]))


@pytest.mark.parametrize("band_bytes", [1000, 20000])
def test_rows_of_a_tile_in_bands_give_the_same_result(monkeypatch: pytest.MonkeyPatch, band_bytes: int) -> None:
    model, z, video = MODELS[0], randn(16, 2, 5, 6), randn(3, 5, 40, 48)
    decoded, encoded = torch.cat(list(model.decode(z)), dim=1), model.encode([video])
    monkeypatch.setattr(vae_blocks, "BAND_BYTES", band_bytes)
    for tile in ((5, 6), (2, 3)):
        assert_equal(assembled(model, z, tile), decoded)
        assert_equal(model.encode_tiles(lambda: [video], tile), encoded)


def test_tiles_are_no_larger_than_asked_and_nearly_equal() -> None:
    assert [(area.rows[:2], area.columns[:2]) for area in grid(5, 7, (3, 9))] == [((0, 2), (0, 7)), ((2, 5), (0, 7))]
    for extent in range(1, 30):
        for longest in range(1, 32):
            lengths = [area.size[1] for area in grid(1, extent, (1, longest))]
            assert sum(lengths) == extent
            assert max(lengths) <= longest
            assert max(lengths) - min(lengths) <= 1


def test_every_tile_comes_from_first_frame_to_last() -> None:
    pieces = [piece[:3] for piece in MODELS[0].decode_tiles(randn(16, 3, 4, 5), (2, 5))]
    assert pieces == [(0, 0, 0), (1, 0, 0), (5, 0, 0), (0, 16, 0), (1, 16, 0), (5, 16, 0)]


@pytest.mark.parametrize(("target", "source"), [((200, 416), (18, 59)), ((0, 208), (0, 33)), ((416, 832), (45, 104))])
def test_the_halo_of_the_full_model_is_seven_latent_pixels(target: tuple[int, int], source: tuple[int, int]) -> None:
    with torch.device("meta"):
        decoder = WanVAE(VAE["wan2.1"]).decoder
    span = Stretch(*target, 832)
    area = next(grid(832, 832, (832, 832)))._replace(columns=span)
    halos = Halos(area).back((*decoder.upsamples[decoder.lowest :], decoder.head))
    assert halos.area.columns == (*source, 104)


def test_the_features_between_the_phases_go_where_park_says() -> None:
    model, z, video = MODELS[0], randn(16, 3, 4, 6), randn(3, 9, 32, 48)
    parked: list[tuple[int, ...]] = []
    fetched: list[tuple[int, ...]] = []

    def park(x: Tensor) -> Tensor:
        parked.append(tuple(x.shape))
        return x.neg()  # fetch undoes it: whoever reads without fetching gets a wrong sign

    def fetch(x: Tensor) -> Tensor:
        fetched.append(tuple(x.shape))
        return x.neg()

    assert_equal(assembled(model, z, (4, 2), park=park, fetch=fetch), torch.cat(list(model.decode(z)), dim=1))
    assert parked == [(4, 6, 16)] * 3
    assert len(fetched) == 9
    del parked[:], fetched[:]
    assert_equal(model.encode_tiles(lambda: [video], (4, 2), park, fetch), model.encode([video]))
    assert parked == fetched[::3] + fetched[1::3] + fetched[2::3] == [(4, 2, 16)] * 9


def test_an_abandoned_decode_in_tiles_leaves_nothing_behind() -> None:
    model, z = MODELS[0], randn(16, 3, 4, 4)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    gc.collect()
    with Storages() as storages:
        abandoned = model.decode_tiles(z, (2, 2))
        pieces = [next(abandoned), next(abandoned)]
        assert storages.now > 0
        del abandoned, pieces
        assert storages.now == 0
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_a_piece_belongs_to_the_caller_alone() -> None:
    pieces = MODELS[0].decode_tiles(randn(16, 2, 4, 4), (2, 4))
    first = next(pieces)
    pixels = weakref.ref(first.pixels)
    del first
    next(pieces)
    assert pixels() is None


def test_wrong_tiles_frames_and_latents_are_refused() -> None:
    model, video = MODELS[0], randn(3, 5, 16, 16)
    with pytest.raises(InputError, match="0x4 latent pixels is empty"):
        next(model.decode_tiles(randn(16, 1, 2, 2), (0, 4)))
    with pytest.raises(InputError, match="latents have shape"):
        next(model.decode_tiles(randn(8, 1, 2, 2), (2, 2)))
    with pytest.raises(InputError, match="multiples of 8"):
        model.encode_tiles(lambda: [video[..., :4]], (1, 1))
    with pytest.raises(InputError, match="no frame"):
        model.encode_tiles(list, (1, 1))
    once = iter([video[:, :1], video[:, 1:]])
    with pytest.raises(InputError, match="differ from one reading to the next"):
        model.encode_tiles(lambda: once, (1, 2))


def test_meta_tensors_take_the_same_operations_and_layouts_as_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_blocks, "BAND_BYTES", 20_000)
    seen = []
    for device in ("cpu", "meta"):
        model, z, video = random_vae(device), randn(16, 2, 3, 5).to(device), randn(3, 5, 24, 40).to(device)
        with Calls() as calls:
            for piece in model.decode_tiles(z, (2, 3)):
                del piece
            model.encode_tiles(lambda video=video: [video], (2, 3))
        seen.append(calls.seen)
    assert seen[0] == seen[1]


def park_on_host(x: Tensor) -> Tensor:
    """Takes a device tensor's place without memory: what a host tensor is to the device."""
    return x.new_empty(1).expand(x.shape)


def full_size(frames: int, height: int, width: int) -> tuple[WanVAE, Tensor, Callable[[], Iterable[Tensor]]]:
    with torch.device("meta"):
        model = WanVAE(VAE["wan2.1"])
        z = torch.empty(16, frames, height, width)
        video = torch.empty(3, 1, 8 * height, 8 * width)

    def chunks() -> Iterator[Tensor]:
        return (video for _ in range(4 * frames - 3))

    return model, z, chunks


@pytest.mark.parametrize(
    ("size", "tile", "decode_gib", "encode_gib"),
    [((60, 104), (30, 52), 1.1, 0.79), ((60, 104), (30, 35), 0.78, 0.66), ((90, 160), (45, 40), 1.23, 0.99)],
)
def test_the_activation_peak_in_tiles_at_full_size(
    size: tuple[int, int], tile: tuple[int, int], decode_gib: float, encode_gib: float
) -> None:
    model, z, chunks = full_size(2, *size)  # the second latent frame is like all later ones
    with Storages() as decoding:
        for piece in model.decode_tiles(z, tile, park=park_on_host):
            del piece
    assert decoding.peak < decode_gib * GIB, f"{decoding.peak / GIB:.3f} GiB"
    with Storages() as encoding:
        model.encode_tiles(chunks, tile, park=park_on_host)
    assert encoding.peak < encode_gib * GIB, f"{encoding.peak / GIB:.3f} GiB"


class Products(TorchDispatchMode):
    """Counts multiplications of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))  # type: ignore[operator]
        name = str(func)
        if name == "wanvram.conv3d.default":
            self.count += result[0, 0].numel() * args[1].numel()
        elif name in ("aten.mm.out", "aten.addmm.default", "aten.addmm_.default"):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[1]
        return result


def products(work: Callable[[], Iterable[object]]) -> int:
    with Products() as counter:
        for _ in work():
            pass
    return counter.count


@pytest.mark.parametrize(
    ("size", "tile", "decode_percent", "encode_percent"),
    [((60, 104), (60, 52), 4, 6), ((60, 104), (30, 52), 10, 15), ((90, 160), (45, 40), 10, 15)],
)
def test_the_arithmetic_spent_on_halos_at_full_size(
    size: tuple[int, int], tile: tuple[int, int], decode_percent: int, encode_percent: int
) -> None:
    model, z, chunks = full_size(2, *size)
    decoding = products(lambda: model.decode_tiles(z, tile)) / products(lambda: model.decode(z))
    assert 1 < decoding < 1 + decode_percent / 100, decoding
    encoding = products(lambda: model.encode_tiles(chunks, tile)) / products(lambda: model.encode(chunks()))
    assert 1 < encoding < 1 + encode_percent / 100, encoding

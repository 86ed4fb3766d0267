"""The VAE's own promises: lazy frames, state per call, equal layouts on meta and CPU, and its activation peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanvram.errors import InputError
from wanvram.kernels.channel_norm import fill_window, rms_norm_silu
from wanvram.kernels.conv import conv2d, conv3d, frame_attention, place_frame
from wanvram.kernels.operation import Operation
from wanvram.models import vae_blocks
from wanvram.models.vae import WanVAE
from wanvram.specs import VAE, VAESpec
from wanvram.units import GIB

SPEC = VAESpec(dim=4, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1, temporal_downsample=(False, True, True))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_vae(device: str = "cpu", spec: VAESpec = SPEC) -> WanVAE:
    """Seeded weights of the size that keeps activations near 1."""
    model = WanVAE(spec)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        fan_in = max(p[0].numel(), 1)
        p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return model.to(device)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Calls(TorchDispatchMode):
    """Records every operation with the shapes and strides of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[Any, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.seen.append((str(func), [(tuple(t.shape), t.stride()) for t in outputs]))
        return result


class Storages(TorchDispatchMode):
    """Bytes of living storages born inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in old | self.live:
                self._born(t.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        self.live.add(storage._cdata)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._died, storage._cdata, storage.nbytes())

    def _died(self, key: int, nbytes: int) -> None:
        self.live.discard(key)
        self.now -= nbytes


def test_decoding_yields_one_frame_and_then_four_per_latent_frame() -> None:
    vae = random_vae()
    frames = vae.decode(randn(16, 3, 2, 3))
    assert isinstance(frames, Iterator)
    assert [tuple(part.shape) for part in frames] == [(3, 1, 16, 24), (3, 4, 16, 24), (3, 4, 16, 24)]


def test_encoding_lazily_equals_encoding_the_whole_video() -> None:
    vae, video, taken = random_vae(), randn(3, 11, 16, 24), []

    def lazily() -> Iterator[Tensor]:
        for index in range(11):
            taken.append(index)
            yield video[:, index : index + 1].clone()

    latents = vae.encode(lazily())
    assert latents.shape == (16, 3, 2, 3)
    assert torch.equal(latents, vae.encode([video]))
    assert taken == list(range(11))


def test_later_frames_do_not_change_earlier_ones() -> None:
    vae, z = random_vae(), randn(16, 3, 2, 3)
    whole = torch.cat(list(vae.decode(z)), dim=1)
    torch.testing.assert_close(next(iter(vae.decode(z[:, :1]))), whole[:, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(list(vae.decode(z[:, :2])), dim=1), whole[:, :5], atol=0, rtol=0)


def test_an_abandoned_decode_leaves_nothing_behind() -> None:
    vae, z = random_vae(), randn(16, 3, 2, 3)
    expected = list(vae.decode(z))
    before = {name: set(vars(module)) for name, module in vae.named_modules()}
    abandoned = vae.decode(randn(16, 3, 4, 2, seed=1))
    next(abandoned), next(abandoned)
    del abandoned
    assert {name: set(vars(module)) for name, module in vae.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(expected, vae.decode(z), strict=True))


def test_rows_in_bands_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, z, video = random_vae(), randn(16, 3, 3, 2), randn(3, 9, 24, 16)
    decoded, encoded = list(vae.decode(z)), vae.encode([video])
    for band_bytes in (1, 3000, 20000):
        monkeypatch.setattr(vae_blocks, "BAND_BYTES", band_bytes)
        for part, expected in zip(vae.decode(z), decoded, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.encode([video]), encoded, atol=1e-5, rtol=1e-5)


def test_one_half_of_the_model_is_enough_for_its_direction() -> None:
    vae = random_vae()
    del vae.encoder, vae.conv1
    assert len(list(vae.decode(randn(16, 2, 2, 2)))) == 2
    vae = random_vae()
    del vae.decoder, vae.conv2
    assert vae.encode([randn(3, 5, 16, 16)]).shape == (16, 2, 2, 2)


def test_wrong_sizes_are_refused() -> None:
    vae = random_vae()
    with pytest.raises(InputError, match="latents have shape"):
        next(iter(vae.decode(randn(8, 1, 2, 2))))
    with pytest.raises(InputError, match="multiples of 8"):
        vae.encode([randn(3, 1, 12, 16)])
    with pytest.raises(InputError, match="no frame"):
        vae.encode([])


def test_copying_weights_keeps_the_channels_last_strides() -> None:
    for name, p in random_vae().named_parameters():
        if p.dim() == 5 and p.shape[4] > 1 and p.shape[1] % 4 == 0:  # the inputs of three frames beside each other
            assert p.permute(0, 3, 4, 2, 1).is_contiguous(), name
        elif p.dim() == 5:
            assert p.is_contiguous(memory_format=torch.channels_last_3d), name
        elif p.dim() == 4 and name.endswith("weight"):
            assert p.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("band_bytes", [vae_blocks.BAND_BYTES, 3000])
@pytest.mark.parametrize("frames", [1, 3])
def test_meta_tensors_take_the_same_operations_and_layouts_as_cpu(
    monkeypatch: pytest.MonkeyPatch, band_bytes: int, frames: int
) -> None:
    monkeypatch.setattr(vae_blocks, "BAND_BYTES", band_bytes)
    seen = []
    for device in ("cpu", "meta"):
        vae = random_vae(device)
        z, video = randn(16, frames, 2, 3).to(device), randn(3, 4 * frames - 3, 16, 24).to(device)
        with Calls() as calls:
            for part in vae.decode(z):
                del part
            vae.encode([video])
        seen.append(calls.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("height", "width", "limit_gib"), [(60, 104, 3.8), (90, 160, 8.6)])
def test_the_activation_peak_of_a_full_size_decode(height: int, width: int, limit_gib: float) -> None:
    with torch.device("meta"):
        vae = WanVAE(VAE["wan2.1"])
        z = torch.empty(16, 21, height, width)
    with Storages() as storages:
        frames = 0
        for part in vae.decode(z):
            frames += part.shape[1]
            del part
            if frames >= 13:  # caches are full after the first frame, every group of four is like the last
                break
    assert storages.peak < limit_gib * GIB, f"{storages.peak / GIB:.2f} GiB"


def test_a_single_image_needs_no_caches() -> None:
    with torch.device("meta"):
        vae = WanVAE(VAE["wan2.1"])
        z, image = torch.empty(16, 1, 60, 104), torch.empty(3, 1, 480, 832)
    for work in (lambda: next(vae.decode(z)), lambda: vae.encode([image])):
        with Storages() as storages:
            work()
        assert storages.peak < 0.65 * GIB, f"{storages.peak / GIB:.2f} GiB"


def test_the_activation_peak_of_a_full_size_encode() -> None:
    with torch.device("meta"):
        vae = WanVAE(VAE["wan2.1"])
        video = torch.empty(3, 9, 480, 832)
    with Storages() as storages:
        vae.encode([video])
    assert storages.peak < 2.6 * GIB, f"{storages.peak / GIB:.2f} GiB"


def test_rms_norm_silu_is_its_formula_and_writes_into_a_slice() -> None:
    x, gamma, buffer = randn(6, 5), randn(5, seed=1), torch.zeros(10, 5)
    x[2] = 0
    rms_norm_silu(x, gamma, buffer[2:8], False)
    expected = F.normalize(x, dim=1) * 5**0.5 * gamma
    torch.testing.assert_close(buffer[2:8], expected)
    assert not buffer[:2].any()
    rms_norm_silu(x, gamma, buffer[2:8], True)
    torch.testing.assert_close(buffer[2:8], F.silu(expected))


def test_frame_attention_is_softmax_attention_for_any_number_of_query_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = randn(13, 24) * 3
    q, k, v = qkv.double().split(8, dim=1)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].float()
    for rows in (1, 4, 13, 1024):
        monkeypatch.setattr("wanvram.kernels.conv.QUERY_ROWS", rows)
        torch.testing.assert_close(frame_attention(qkv.clone()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_the_convolution_states_its_real_shape_and_layout_on_meta(stride: tuple[int, int, int]) -> None:
    layout = torch.channels_last_3d
    x = randn(1, 4, 5, 7, 6).contiguous(memory_format=layout)
    weight = randn(8, 4, 3, 3, 3, seed=1).contiguous(memory_format=layout)
    real = conv3d(x, weight, None, stride, (0, 1, 1))
    fake = conv3d(x.to("meta"), weight.to("meta"), None, stride, (0, 1, 1))
    assert (real.shape, real.stride()) == (fake.shape, fake.stride())
    torch.testing.assert_close(real, F.conv3d(x, weight, None, stride, (0, 1, 1)))
    picture, flat = x[:, :, 0].contiguous(memory_format=torch.channels_last), weight[:, :, 0].contiguous()
    real = conv2d(picture, flat, None, stride[1:], (1, 1))
    fake = conv2d(picture.to("meta"), flat.to("meta"), None, stride[1:], (1, 1))
    assert (real.shape, real.stride()) == (fake.shape, fake.stride())
    torch.testing.assert_close(real, F.conv2d(picture, flat, None, stride[1:], (1, 1)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels", [6, 96, 192, 384])
@pytest.mark.parametrize("silu", [False, True])
def test_the_triton_norm_equals_the_reference(channels: int, silu: bool) -> None:
    x, gamma = randn(1001, channels).cuda(), randn(channels, seed=1).cuda()
    x[3] = 0
    out = torch.zeros(1009, channels, device="cuda")
    rms_norm_silu(x, gamma, out[4:1005], silu)
    expected = F.normalize(x, dim=1) * channels**0.5 * gamma
    torch.testing.assert_close(out[4:1005], F.silu(expected) if silu else expected, atol=1e-5, rtol=1e-5)
    assert not out[:4].any()
    assert not out[1005:].any()


def frames_of(count: int, channels: int, device: str) -> list[Tensor]:
    frames = (randn(1, channels, 1, 6, 7, seed=seed) for seed in range(count))
    return [frame.to(device).contiguous(memory_format=torch.channels_last_3d) for frame in frames]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("channels", [6, 96, 384])
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_a_window_holds_rows_of_the_history_and_the_newest_frame_which_becomes_history(
    device: str, channels: int, past: int, normed: bool, flat: bool
) -> None:
    x, *history = frames_of(1 + past, channels, device)
    before = [old.clone() for old in history]
    gamma = randn(channels, 1, 1, 1, seed=9).to(device) if normed else None
    newest = x.movedim(1, -1)
    if gamma is not None:
        newest = F.silu(F.normalize(newest, dim=-1) * channels**0.5 * gamma.view(-1))
    newest = newest.movedim(-1, 1)
    if flat:  # the frames' channels beside each other
        picture = vae_blocks.new_picture(x, (past + 1) * channels, 3, 7)
        fill_window(x, history, gamma, picture, 2 * 7, 2 * 7)
        window = picture.unflatten(1, (past + 1, channels)).transpose(1, 2)
    else:
        window = vae_blocks.new_frames(x, channels, past + 1, 3, 7)
        fill_window(x, history, gamma, window, 2 * 7, 2 * 7)
    expected = torch.cat([*(old[..., 2:5, :] for old in before), newest[..., 2:5, :]], dim=2)
    torch.testing.assert_close(window, expected, atol=1e-5, rtol=1e-5)
    for old, was in zip(history, before, strict=True):
        if old is history[0]:
            assert torch.equal(old[..., 2:4, :], window[:, :, 2:, :2])
            assert torch.equal(old[..., :2, :], was[..., :2, :])
            assert torch.equal(old[..., 4:, :], was[..., 4:, :])
        else:
            assert torch.equal(old, was)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("channels", [6, 96, 384])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_of_a_frame_is_placed_with_its_bias_or_added(
    device: str, channels: int, add: bool, dtype: torch.dtype
) -> None:
    frame, out = (x.to(dtype) for x in frames_of(2, channels, device))
    bias, before = randn(channels, seed=9).to(device, dtype), out.clone()
    part = frame[..., 1:4, 2:6]
    expected = part + bias.view(-1, 1, 1, 1) + (before[..., 2:5, 1:5] if add else 0)
    place_frame(part, bias, out[..., 2:5, 1:5], add)
    torch.testing.assert_close(out[..., 2:5, 1:5], expected, atol=1e-6, rtol=1e-6)
    out[..., 2:5, 1:5] = before[..., 2:5, 1:5]
    assert torch.equal(out, before), "nothing beside the part changes"


@pytest.mark.parametrize("past", [0, 2])
def test_three_frames_as_one_picture_give_what_the_convolution_of_frames_gives(past: int) -> None:
    conv = vae_blocks.Conv(8, 12, (3, 3, 3), torch.float32)
    assert conv.flat
    conv.weight.copy_(randn(12, 8, 3, 3, 3, seed=3))
    conv.bias.copy_(randn(12, seed=4))
    stream = vae_blocks.Stream(remember=past > 0)
    frames = frames_of(3, 8, "cpu") if past else frames_of(1, 8, "cpu")
    for frame in frames:
        out = conv.causal(frame.clone(memory_format=torch.channels_last_3d), stream)
    padded = torch.cat([frames[0].new_zeros(1, 8, 3 - len(frames), 6, 7), *frames], dim=2)
    torch.testing.assert_close(out, F.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "kernel", "dtype"),
    [(3, (3, 3, 3), torch.float32), (8, (3, 1, 1), torch.float32), (8, (3, 3, 3), torch.bfloat16)],
)
def test_few_channels_frames_without_extent_and_sixteen_bits_stay_frames(
    inputs: int, kernel: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert not vae_blocks.Conv(inputs, 8, kernel, dtype).flat


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_allocates_what_meta_tensors_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_blocks, "BAND_BYTES", 200_000)
    monkeypatch.setattr(Operation, "direct_on_cuda", False)  # seen by the dispatcher, as on meta
    seen = []
    for device in ("cuda", "meta"):
        vae = random_vae(device, VAE["tiny"])
        z = randn(16, 3, 8, 12).to(device)
        with Calls() as calls:
            for part in vae.decode(z):
                del part
        seen.append(calls.seen)
    assert seen[0] == seen[1]

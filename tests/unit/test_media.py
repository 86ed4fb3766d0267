"""Pictures and source videos: what is read, which frames are chosen, and the clear sentence each bad file gets."""

from __future__ import annotations

import os
import shlex
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from given_files import write_video
from parity.golden import load_json
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.media.sources import (
    SEQUENCE_LENGTHS,
    FramePlan,
    SourceVideo,
    VideoInfo,
    picture_size,
    plan_frames,
    probe_video,
    read_picture,
)

FACTS = load_json("facts")["vace_source_video"]["examples"]
ORIENTATION = 0x0112
WIDTH, HEIGHT = 64, 48


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# Pictures


def _picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (60, 40), **options: Any) -> Image.Image:
    image = Image.fromarray(_noise(size[1], size[0], 4)[..., : len(Image.new(mode, (1, 1)).getbands())].squeeze(), mode)
    image.save(path, **options)
    return image


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm"])
def test_a_lossless_picture_is_read_exactly(name: str, tmp_path: Path) -> None:
    image = _picture(tmp_path / name)
    pixels = read_picture(tmp_path / name, "--image")
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (40, 60, 3)
    assert np.array_equal(pixels.numpy(), np.asarray(image))
    assert picture_size(tmp_path / name, "--image") == (60, 40)


def test_alpha_is_dropped_and_grey_is_tripled(tmp_path: Path) -> None:
    rgba, grey = _picture(tmp_path / "a.png", "RGBA"), _picture(tmp_path / "g.png", "L")
    assert np.array_equal(read_picture(tmp_path / "a.png", "--image").numpy(), np.asarray(rgba)[..., :3])
    assert np.array_equal(read_picture(tmp_path / "g.png", "--image").numpy(), np.stack([np.asarray(grey)] * 3, -1))


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 255))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert torch.equal(read_picture(tmp_path / "a.gif", "--image")[0, 0], torch.tensor([255, 0, 0], dtype=torch.uint8))


@pytest.mark.parametrize("extension", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_the_exif_orientation_is_applied(extension: str, orientation: int, turns: int, tmp_path: Path) -> None:
    path, exif, stored = tmp_path / f"a.{extension}", Image.Exif(), np.zeros((40, 64, 3), np.uint8)
    stored[:16, :32] = 255  # a white corner shows which way is up
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(path, exif=exif)
    upright = np.rot90(stored, turns)
    pixels = read_picture(path, "--image").numpy()
    assert pixels.shape == upright.shape
    assert np.array_equal(pixels > 127, upright > 127)
    assert picture_size(path, "--image") == (upright.shape[1], upright.shape[0])


def _png_of_size(path: Path, width: int, height: int) -> None:
    """A PNG with a header and one byte of picture data."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(("width", "height"), [(20000, 20000), (10000, 9000), (8001, 8000), (2**31 - 1, 2**31 - 1)])
def test_a_huge_picture_is_refused_with_its_numbers_from_its_header(
    width: int, height: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    _png_of_size(tmp_path / "huge.png", width, height)
    for read in (read_picture, picture_size):
        with pytest.raises(
            InputError, match=f"--image .*huge.png is {width}x{height}, {width * height:,} pixels.*64,000,000"
        ):
            read(tmp_path / "huge.png", "--image")
    assert Image.MAX_IMAGE_PIXELS == 1_000_000  # Pillow's own limit is as it was


def test_the_size_comes_from_the_header_without_decoding(tmp_path: Path) -> None:
    _png_of_size(tmp_path / "short.png", 8000, 8000)  # at the limit; the pixels are not there
    assert picture_size(tmp_path / "short.png", "--image") == (8000, 8000)


@pytest.mark.parametrize(("name", "keep"), [("a.png", 0.5), ("a.jpg", 0.5), ("a.bmp", 0.9), ("a.gif", 0.7)])
def test_a_truncated_picture_is_refused(name: str, keep: float, tmp_path: Path) -> None:
    _picture(tmp_path / name, "L" if name == "a.gif" else "RGB", size=(200, 200))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=rf"--first_frame .*{name} is truncated or damaged \([\d,]+ bytes"):
        read_picture(tmp_path / name, "--first_frame")


def _save_deep(path: Path) -> None:
    Image.fromarray(_noise(40, 40).astype(np.uint16) * 200).save(path)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("absent.png", lambda path: None, "does not exist"),
        ("folder.png", Path.mkdir, "is not a file"),
        ("empty.png", Path.touch, "is not an image"),
        ("text.png", lambda path: path.write_text("a picture of a cat"), "is not an image"),
        ("cut.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "is not an image"),
        ("thin.png", lambda path: _picture(path, size=(400, 31)), "is 400x31; both sides need at least 32 pixels"),
        ("narrow.png", lambda path: _picture(path, size=(31, 400)), "is 31x400; both sides"),
        ("deep.png", _save_deep, "has more than 8 bits a channel"),
        ("page.eps", lambda path: _picture(path), "is PostScript"),
    ],
)
def test_what_is_no_usable_picture_is_refused(name: str, make: Any, sentence: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    for read in (read_picture, picture_size):
        with pytest.raises(InputError, match=f"--image .*{name} {sentence}"):
            read(tmp_path / name, "--image")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_picture_without_permission_is_refused(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(InputError, match="permission denied"):
        read_picture(tmp_path / "a.png", "--image")


# The choice of frames


@pytest.mark.parametrize("fact", FACTS, ids=lambda f: "{}x{}_{num_frames}f_{fps}fps".format(*f["wh"], **f))
def test_frames_and_size_are_the_official_ones(fact: dict[str, Any]) -> None:
    plan = plan_frames(VideoInfo(*fact["wh"], fact["num_frames"], fact["fps"]), fact["area"])
    assert list(plan.frame_ids) == fact["frame_ids"]
    assert [plan.height, plan.width] == fact["out_hw"]
    assert len(plan.frame_ids) == fact["out_frames"]
    assert SEQUENCE_LENGTHS[fact["area"]] == fact["seq_len"]


@pytest.mark.parametrize(("frames", "fps"), [(88, 24.0), (113, 16.0), (500, 30000 / 1001), (700, 25.0)])
def test_a_time_on_the_border_of_two_frames_takes_the_first_that_holds_it_in_float32(frames: int, fps: float) -> None:
    starts = (np.arange(frames) / fps).astype(np.float32)
    ends = ((np.arange(frames) + 1) / fps).astype(np.float32)
    times = np.linspace(0.0, float(np.array([starts[-1], ends[-1]]).mean()), 81)
    holds = (times[:, None] >= starts) & (times[:, None] <= ends)
    assert (holds.sum(1) > 1).any() or fps != 16.0  # 113 frames at 16/s: time 32 is exactly 45/16 s
    assert list(plan_frames(VideoInfo(832, 480, frames, fps), 480 * 832).frame_ids) == holds.argmax(1).tolist()


side = st.integers(16, 8192)


@given(side, side, st.integers(1, 3000), st.sampled_from([1.0, 16.0, 24000 / 1001, 29.97, 60.0, 240.0]), st.booleans())
def test_every_plan_is_within_the_source_and_the_sequence(w: int, h: int, frames: int, fps: float, large: bool) -> None:
    area = 720 * 1280 if large else 480 * 832
    plan = plan_frames(VideoInfo(w, h, frames, fps), area)
    ids = plan.frame_ids
    assert len(ids) % 4 == 1
    assert ids[0] == 0
    assert list(ids) == sorted(set(ids))
    assert ids[-1] == frames - 1 or len(ids) == 1
    assert plan.height % 16 == plan.width % 16 == 0
    assert 0 < plan.height * plan.width <= min(area, w * h)
    assert ((len(ids) - 1) // 4 + 1) * plan.height * plan.width // 256 <= SEQUENCE_LENGTHS[area]


def test_a_size_of_tiny_weights_takes_as_many_frames_as_an_official_one() -> None:
    plan = plan_frames(VideoInfo(640, 480, 200, 16.0), 128 * 80)
    assert (len(plan.frame_ids), plan.width, plan.height) == (81, 128, 80)
    slim = plan_frames(VideoInfo(4096, 16, 5, 16.0), 16 * 16)
    assert (slim.width, slim.height) == (16, 16)


# Videos


def _video(
    path: Path,
    frames: int = 20,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    fps: int | Fraction = 16,
    **muxer: str,
) -> np.ndarray:
    """Writes noise and gives it as uint8 [frames, height, width, 3]."""
    pictures = _noise(frames, size[1], size[0], 3)
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.options = {"qp": "0"} if codec == "libx264rgb" else {}
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return pictures


def _lossless(path: Path, **options: Any) -> np.ndarray:
    return _video(path, codec="ffv1", pix_fmt="bgr0", **options)


def _normalised(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.mov"])
@pytest.mark.parametrize("fps", [8, 16, Fraction(30000, 1001)])
def test_a_video_is_probed_whatever_its_container_says(name: str, fps: int | Fraction, tmp_path: Path) -> None:
    _video(tmp_path / name, fps=fps, codec="mpeg4" if name == "a.avi" else "libx264")
    info = probe_video(tmp_path / name, "--src_video")
    assert (info.width, info.height, info.frames) == (WIDTH, HEIGHT, 20)
    assert info.fps == pytest.approx(float(fps), rel=1e-3)


def test_a_gif_and_a_single_frame_are_videos_too(tmp_path: Path) -> None:
    _video(tmp_path / "a.gif", codec="gif", pix_fmt="rgb8")
    _video(tmp_path / "one.mp4", frames=1)
    assert probe_video(tmp_path / "a.gif", "--src_video").frames == 20
    info = probe_video(tmp_path / "one.mp4", "--src_video")
    plan = plan_frames(info, 480 * 832)
    assert plan.frame_ids == (0,)
    assert [chunk.shape for chunk in SourceVideo(tmp_path / "one.mp4", plan).chunks()] == [(3, 1, HEIGHT, WIDTH)]


def test_frames_that_an_edit_list_cuts_off_are_not_counted(tmp_path: Path) -> None:
    _video(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts - 5 * 1024, packet.dts - 5 * 1024  # 1/16384 s: five frames
                target.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        decodable = sum(1 for _ in container.decode(video=0))
    assert decodable < 20
    assert probe_video(tmp_path / "cut.mp4", "--src_video").frames == decodable


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [
    ("a.mkv", "ffv1", "bgr0"), ("a.mp4", "libx264rgb", "rgb24"), ("a.avi", "png", "rgb24"),
])  # fmt: skip
def test_lossless_frames_come_out_exactly_in_pieces_of_one_and_four(
    name: str, codec: str, pix_fmt: str, tmp_path: Path
) -> None:
    pictures = _video(tmp_path / name, codec=codec, pix_fmt=pix_fmt, frames=22)
    plan = plan_frames(probe_video(tmp_path / name, "--src_video"), 480 * 832)
    assert (plan.height, plan.width) == (HEIGHT, WIDTH)
    assert len(plan.frame_ids) == 21
    video = SourceVideo(tmp_path / name, plan)
    chunks = list(video.chunks())
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4, 4, 4, 4]
    joined = torch.cat(chunks, 1)
    assert joined.dtype == torch.float32
    assert torch.equal(joined, _normalised(pictures[list(plan.frame_ids)]))
    video.path.unlink()  # what was decoded to the end is not decoded again
    assert torch.equal(torch.cat(list(video.chunks()), 1), joined)


@pytest.mark.parametrize(("height", "width", "high", "wide"), [(32, 32, 32, 43), (96, 96, 96, 128), (32, 64, 48, 64)])
def test_frames_are_scaled_to_cover_the_size_and_cut_in_the_middle(
    height: int, width: int, high: int, wide: int, tmp_path: Path
) -> None:
    pictures = _lossless(tmp_path / "a.mkv", frames=5)
    plan = FramePlan((0, 1, 2, 3, 4), height, width)
    frames = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    scaled = functional.interpolate(frames, size=(high, wide), mode="bicubic", antialias=True) / 127.5 - 1
    top, left = (high - height) // 2, (wide - width) // 2
    expected = scaled[:, :, top : top + height, left : left + width].transpose(0, 1)
    joined = torch.cat(list(SourceVideo(tmp_path / "a.mkv", plan).chunks()), 1)
    assert torch.allclose(joined, expected, atol=1e-6)
    assert joined.abs().max() <= 1


def test_a_mask_is_the_first_channel_from_0_to_1_at_the_same_frames(tmp_path: Path) -> None:
    _lossless(tmp_path / "video.mkv", frames=20)
    pictures = _lossless(tmp_path / "mask.mkv", frames=30)
    plan = FramePlan((0, 7, 8, 12, 19), HEIGHT, WIDTH)
    chunks = list(SourceVideo(tmp_path / "mask.mkv", plan, mask=True).chunks())
    assert [chunk.shape for chunk in chunks] == [(1, 1, HEIGHT, WIDTH), (1, 4, HEIGHT, WIDTH)]
    mask = torch.cat(chunks, 1)
    assert torch.allclose(mask[0], torch.from_numpy(pictures[list(plan.frame_ids), ..., 0]) / 255, atol=1e-6)
    assert (mask.min(), mask.max()) == (0, 1)


def test_a_mask_of_another_size_is_brought_to_the_size_of_the_video(tmp_path: Path) -> None:
    _lossless(tmp_path / "mask.mkv", frames=1, size=(100, 50))
    (mask,) = SourceVideo(tmp_path / "mask.mkv", FramePlan((0,), HEIGHT, WIDTH), mask=True).chunks()
    assert mask.shape == (1, 1, HEIGHT, WIDTH)
    assert mask.min() >= 0
    assert mask.max() <= 1


def test_a_mask_that_would_be_scaled_to_a_giant_is_refused(tmp_path: Path) -> None:
    _lossless(tmp_path / "line.mkv", frames=1, size=(4096, 16))
    source = SourceVideo(tmp_path / "line.mkv", FramePlan((0,), 720, 1280), mask=True)
    with pytest.raises(InputError, match=r"--src_mask .*line.mkv is 4096x16, which is too thin to be cut to 1280x720"):
        list(source.chunks())


def test_only_one_piece_is_in_memory(tmp_path: Path) -> None:
    _lossless(tmp_path / "a.mkv", frames=21)
    chunks = SourceVideo(tmp_path / "a.mkv", FramePlan(tuple(range(21)), HEIGHT, WIDTH)).chunks()
    sizes = []
    for chunk in chunks:
        sizes.append(chunk.untyped_storage().nbytes())
        held = [value for value in chunks.gi_frame.f_locals.values() if isinstance(value, torch.Tensor)]
        assert held == []
    assert sizes == [count * 3 * HEIGHT * WIDTH * 4 for count in (1, 4, 4, 4, 4, 4)]


# Videos that are refused


def _cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _truncated(path: Path, **options: Any) -> None:
    _video(path, **options)
    _cut(path)


def _sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _without_frames(path: Path) -> None:
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()


def _ivf_header(path: Path) -> None:
    path.write_bytes(struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"VP90", WIDTH, HEIGHT, 16, 1, 20, 0))


def _unknown_codec(path: Path) -> None:
    _lossless(path)
    path.write_bytes(path.read_bytes().replace(b"V_FFV1", b"V_ABCD"))


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("absent.mp4", lambda path: None, "does not exist"),
        ("folder.mp4", Path.mkdir, "is not a file"),
        ("empty.mp4", Path.touch, "is not a video"),
        ("noise.mp4", lambda path: path.write_bytes(_noise(5000).tobytes()), "is not a video"),
        ("story.txt", lambda path: path.write_text("a video of a cat\n" * 50), "is not a video"),
        ("list.m3u8", lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nfile:/etc/passwd\n"), "is not a video"),
        ("picture.png", _picture, "is not a video"),
        ("index_last.mp4", _truncated, "is not a video"),
        ("sound.mp4", _sound, "has no video stream"),
        ("nothing.mp4", _without_frames, "has no frame that can be decoded"),
        ("header.ivf", _ivf_header, "has no frame that can be decoded"),
        ("odd.mkv", _unknown_codec, "is in a codec"),
        ("small.mp4", lambda path: _video(path, frames=1, size=(64, 14)), "is 64x14; both sides must be 16 to 8192"),
        ("wide.mkv", lambda path: _lossless(path, frames=1, size=(8208, 16)), "is 8208x16; both sides"),
        ("cut.mp4", lambda path: _truncated(path, movflags="faststart"), r"is truncated: \d+ of its 20 frames"),
        ("cut.avi", lambda path: _truncated(path, codec="png", pix_fmt="rgb24"), r"is truncated: \d+ of its 20 frames"),
    ],
)
def test_what_is_no_usable_video_is_refused(name: str, make: Any, sentence: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"--src_video .*{name} {sentence}"):
        probe_video(tmp_path / name, "--src_video")


def test_a_video_that_ends_before_the_plan_is_refused(tmp_path: Path) -> None:
    _lossless(tmp_path / "a.mkv", frames=7)
    chunks = SourceVideo(tmp_path / "a.mkv", FramePlan((0, 2, 4, 6, 8), HEIGHT, WIDTH)).chunks()
    assert next(chunks).shape[1] == 1
    with pytest.raises(
        InputError, match=r"--src_video .*a.mkv is truncated: 7 frames can be decoded, frame 9 is needed"
    ):
        next(chunks)


def test_damage_in_the_middle_is_an_input_error_when_it_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    _video(path, frames=40, movflags="faststart")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    plan = plan_frames(probe_video(path, "--src_video"), 480 * 832)
    chunks = SourceVideo(path, plan).chunks()
    next(chunks)
    with pytest.raises(InputError, match=r"--src_video .*a.mp4 is damaged and cannot be decoded"):
        list(chunks)


def test_a_source_that_vanished_is_an_input_error_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--src_mask .*gone.mp4 does not exist"):
        next(SourceVideo(tmp_path / "gone.mp4", FramePlan((0,), HEIGHT, WIDTH), mask=True).chunks())


def test_what_would_make_a_run_after_a_source_video_fit_holds_its_whole_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As cases/inputs/v_tall.mp4 in the field: the remedy was that of another video."""
    path = tmp_path / "v_tall.mp4"
    write_video(path, 17, 96, 160)
    flags = ["--task", "vace-14B", "--size", "1280*720", "--load_strategy", "full", "--gpu", "rtx4090"]
    flags += ["--precision", "bf16", "--sample_steps", "7", "--src_video", str(path)]
    assert main(["estimate", *flags]) == 1  # out of memory; 3 is for a budget that was given
    (remedy,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  wanvram plan")]
    given = dict(zip(shlex.split(remedy)[2::2], shlex.split(remedy)[3::2], strict=True))
    assert {
        name: given[name] for name in ("--task", "--size", "--precision", "--sample_steps", "--src_video", "--gpu")
    } == {
        "--task": "vace-14B",
        "--size": "1280*720",
        "--precision": "bf16",
        "--sample_steps": "7",
        "--src_video": str(path),
        "--gpu": "rtx4090",
    }


def test_a_video_that_a_phone_filmed_upright_is_read_upright() -> None:
    """Stored as 160x96 with black on the left; a quarter turn clockwise brings that to the top."""
    path = Path(__file__).parents[1] / "data" / "field" / "v_rot90.mp4"
    info = probe_video(path, "--src_video")
    assert (info.width, info.height) == (96, 160)
    plan = plan_frames(info, 96 * 160)
    first = next(iter(SourceVideo(path, plan).chunks()))[:, 0]
    assert first.shape[1:] == (160, 96)
    assert first[:, :8].mean() < first[:, 40:].mean() - 0.3

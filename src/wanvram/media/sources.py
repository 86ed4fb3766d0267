"""The user's pictures and source videos, read on the host and checked before any model is loaded.

Whatever is wrong with a file is an InputError that names the flag and the path. Pictures go through Pillow, videos through PyAV;
the choice of frames and the size follow the official VaceVideoProcessor (tests/golden/facts.json, key vace_source_video).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from wanvram.errors import InputError
from wanvram.specs import WAN21_GEOMETRY, Geometry

__all__ = ["FramePlan", "SourceVideo", "VideoInfo", "picture_size", "plan_frames", "probe_video", "read_picture"]

MIN_PICTURE_SIDE = 32
MAX_PICTURE_PIXELS = 64_000_000  # 192 MB as RGB

MIN_VIDEO_SIDE, MAX_VIDEO_SIDE = WAN21_GEOMETRY.token_side, 8192
SEQUENCE_LENGTHS = {720 * 1280: 75600, 480 * 832: 32760}  # pixels of a frame -> tokens of the whole video, as official
FRAMES = 81  # of these lengths; a frame of another size, which only tiny weights make, gets as many

# A text file, a playlist or a picture is a "video" to FFmpeg too, and a playlist may name any file or address.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,gif,ogg,asf,mxf,ivf,nut,yuv4mpegpipe,h264,hevc,obu,dv"


def read_picture(path: Path, flag: str) -> Tensor:
    """The picture as uint8 [H, W, 3], RGB, on the host; of an animation the first frame.

    Alpha is dropped, not blended, as in the official script. Unlike there, the EXIF orientation is applied: otherwise a phone's
    upright photo lies on its side. Raises InputError as picture_size does, and for a picture that cannot be decoded to its end.
    """
    from PIL import Image, ImageOps

    with _opened_picture(path, flag) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # damaged EXIF, odd palettes: the pixels are what counts
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(
                f"{flag} {path} is truncated or damaged ({path.stat().st_size:,} bytes; {error}); "
                "save the picture again, or give another one"
            ) from error
    return torch.from_numpy(pixels)


def picture_size(path: Path, flag: str) -> tuple[int, int]:
    """(width, height) in pixels that read_picture would give, from the header alone: no pixel is decoded.

    Raises InputError: no such file, not an image, a side below 32 pixels, more than 64 million pixels, more than 8 bits a channel.
    """
    with _opened_picture(path, flag) as image:
        return _upright_size(image)


@contextmanager
def _opened_picture(path: Path, flag: str) -> Iterator[Any]:
    name = f"{flag} {path}"
    _check_file(path, name)
    with path.open("rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = _open_any_size(file)
                size = _upright_size(image)
        except Exception as error:  # a damaged header can fail in any way
            raise InputError(f"{name} is not an image that Pillow reads, such as PNG, JPEG or WebP") from error
        _check_picture(image, size, name)
        yield image


def _check_picture(image: Any, size: tuple[int, int], name: str) -> None:
    pixels = size[0] * size[1]
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise InputError(f"{name} is PostScript, not an image of pixels; convert it to PNG")
    if min(size) < MIN_PICTURE_SIDE:
        raise InputError(f"{name} is {size[0]}x{size[1]}; both sides need at least {MIN_PICTURE_SIDE} pixels")
    if pixels > MAX_PICTURE_PIXELS:
        raise InputError(
            f"{name} is {size[0]}x{size[1]}, {pixels:,} pixels; at most {MAX_PICTURE_PIXELS:,} are read: scale it down"
        )
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(
            f"{name} has more than 8 bits a channel (mode {image.mode}), which would be clipped to white; save it with 8 bits"
        )


def _open_any_size(file: BinaryIO) -> Any:
    """Image.open without its own limit, which would raise before the size is known; ours is checked right after."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        return Image.open(file)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright_size(image: Any) -> tuple[int, int]:
    from PIL import ExifTags, Image

    # The base class's getexif: the PNG reader's own would decode the whole picture in search of a late chunk.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    # Pillow may have turned a TIFF's .size already; the tags are as in the file.
    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _check_file(path: Path, name: str) -> None:
    if not os.path.exists(path):
        raise InputError(f"{name} does not exist")
    if not os.path.isfile(path):
        raise InputError(f"{name} is not a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{name} cannot be read: permission denied")


@dataclass(frozen=True)
class VideoInfo:
    """Size in pixels, number of frames, average frames a second."""

    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True)
class FramePlan:
    """Which frames of the source are used, 4n+1 in rising order, and the size in pixels they are brought to."""

    frame_ids: tuple[int, ...]
    height: int
    width: int
    geometry: Geometry = WAN21_GEOMETRY


def probe_video(path: Path, flag: str) -> VideoInfo:
    """Size, frames and rate of a video: its packets are counted, only the first frame is decoded.

    Upright, as players show it. Raises InputError: no such file, not a video, no video stream, no frame, truncated,
    a side below 16 or above 8192 pixels. Damage inside a later frame shows only when SourceVideo decodes it.
    """
    name = f"{flag} {path}"
    with _opened_video(path, flag) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise InputError(f"{name} states no frame rate; write it again as mp4")
        first = next(container.decode(stream), None)
        if first is None:
            raise InputError(f"{name} has no frame that can be decoded")
        _check_video_size(first.width, first.height, name)
        width, height = (first.height, first.width) if _quarter_turns(first) % 2 else (first.width, first.height)
    with _opened_video(path, flag) as (container, stream):
        frames = _count_frames(container, stream, name)
    return VideoInfo(width, height, frames, float(rate))


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise, by which the file's metadata has a frame turned; phones film upright and write it so."""
    return round(getattr(frame, "rotation", 0) / 90)


def _count_frames(container: Any, stream: Any, name: str) -> int:
    # mp4's own count may include what an edit list cuts off; its index, which only recent PyAV gives, does not.
    is_mp4 = "mp4" in container.format.name
    expected = len(getattr(stream, "index_entries", ())) if is_mp4 else stream.frames
    present = shown = 0
    for packet in container.demux(stream):
        if packet.size:  # the last one is empty: it flushes the decoder
            present += 1
            shown += not packet.is_discard
    if present < expected:
        raise InputError(f"{name} is truncated: {present} of its {expected} frames are there")
    if not shown:
        raise InputError(f"{name} has no frame that can be decoded")
    return shown


def _check_video_size(width: int, height: int, name: str) -> None:
    if not width or not height:
        raise InputError(f"{name} has no frame that can be decoded")
    if min(width, height) < MIN_VIDEO_SIDE or max(width, height) > MAX_VIDEO_SIDE:
        raise InputError(f"{name} is {width}x{height}; both sides must be {MIN_VIDEO_SIDE} to {MAX_VIDEO_SIDE} pixels")


@contextmanager
def _opened_video(path: Path, flag: str) -> Iterator[tuple[Any, Any]]:
    import av

    name = f"{flag} {path}"
    _check_file(path, name)
    allowed = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", options=allowed, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        size = path.stat().st_size
        raise InputError(f"{name} is not a video that can be read, such as mp4, mkv or avi ({size:,} bytes)") from error
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise InputError(f"{name} has no video stream")
        if stream.codec_context is None:
            raise InputError(f"{name} is in a codec that this PyAV cannot decode; write it again as H.264")
        _check_video_size(stream.width, stream.height, name)
        # A stream may change its size midway.
        stream.codec_context.options = {"max_pixels": str(MAX_VIDEO_SIDE**2)}
        try:
            yield container, stream
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{name} is damaged and cannot be decoded: {error.strerror}") from error


def plan_frames(info: VideoInfo, area: int, geometry: Geometry = WAN21_GEOMETRY) -> FramePlan:
    """The frames and the size that official VACE (keep_last, starting at 0) takes from a source video.

    area: pixels of a frame, 720*1280 or 480*832; of tiny weights any. The result keeps the source's aspect, is whole tokens on
    both sides and never larger than the source; with a mask video, give the info with the smaller `frames` of the two.
    The source's frames are taken as evenly spaced. Official asks the container for each frame's time, which in a video of
    variable rate chooses other frames.
    """
    side = geometry.token_side
    tokens = SEQUENCE_LENGTHS.get(area, area // side**2 * geometry.latent_frames(FRAMES))
    cells: float = min(tokens, area / side**2, (info.height // side) * (info.width // side))
    latents = min(geometry.latent_frames(info.frames), int(tokens / cells))
    cells = min(cells, int(tokens / latents))
    rows = max(1, round(math.sqrt(cells * (info.height / info.width))))
    columns = max(1, int(cells / rows))
    return FramePlan(_frame_ids(info, geometry.video_frames(latents)), rows * side, columns * side, geometry)


def _frame_ids(info: VideoInfo, count: int) -> tuple[int, ...]:
    """`count` times, evenly from 0 to the middle of the last frame, each as the first frame whose interval holds it."""
    # Borders in float32, times in float64, as official under the numpy < 2 it pins (numpy >= 2.1 would take float32 times too):
    # a time on the border of two frames falls where the rounding puts it.
    edges = (np.arange(info.frames + 1) / info.fps).astype(np.float32)
    times = np.linspace(0.0, float(edges[-2:].mean()), count)
    return tuple(int(frame) for frame in np.asarray(np.searchsorted(edges[1:], times)))


class SourceVideo:
    """The planned frames of a video, or of a mask video, decoded as a stream.

    What was decoded to the end once is kept in 8 bits a value (214 MiB for 81 frames of 1280x720): encoding reads the frames
    twice, and in tiles twice a tile.
    """

    def __init__(self, path: Path, plan: FramePlan, *, mask: bool = False) -> None:
        self.path = path
        self.plan = plan
        self.mask = mask
        self.flag = "--src_mask" if mask else "--src_video"
        self._kept: tuple[Tensor, ...] = ()

    def chunks(self) -> Iterator[Tensor]:
        """float32 [3, t, H, W] in [-1, 1] on the host, t = 1, 4, 4, ...; a mask [1, t, H, W] in [0, 1], its first channel.

        In float32 one piece is in memory at a time. Raises InputError: the file is not a video, decoding fails, or it ends before
        the plan does.
        """
        with closing(self._frames()) as frames:
            for count in self.plan.geometry.pieces(len(self.plan.frame_ids)):
                yield self._join(frames, count)

    def _join(self, frames: Iterator[Tensor], count: int) -> Tensor:
        chunk = torch.empty(1 if self.mask else 3, count, self.plan.height, self.plan.width)
        for position, frame in enumerate(islice(frames, count)):
            chunk[:, position] = frame
        return chunk

    def _frames(self) -> Generator[Tensor, None, None]:
        """Every planned frame as float32 [C, H, W]."""
        if self._kept:
            yield from map(self._normalised, self._kept)
            return
        pictures: list[Tensor] = []
        for picture in self._decoded():
            pictures.append(picture)
            if len(pictures) == len(self.plan.frame_ids):  # before the last one is handed out: nobody asks for more
                self._kept = tuple(pictures)
            yield self._normalised(picture)

    def _decoded(self) -> Generator[Tensor, None, None]:
        """Every planned frame as uint8 [C, H, W]."""
        frame_ids = self.plan.frame_ids
        done = decoded = 0
        with _opened_video(self.path, self.flag) as (container, stream):
            for frame in container.decode(stream):
                if frame_ids[done] == decoded:
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame))
                    picture = self._resized(np.ascontiguousarray(pixels)).contiguous()
                while done < len(frame_ids) and frame_ids[done] == decoded:
                    yield picture
                    done += 1
                if done == len(frame_ids):
                    return
                decoded += 1
        raise InputError(
            f"{self.flag} {self.path} is truncated: {decoded} frames can be decoded, frame {frame_ids[done] + 1} is needed"
        )

    def _resized(self, pixels: np.ndarray) -> Tensor:
        """uint8 [h, w, 3] -> uint8 [C, H, W]: scaled until it covers the planned size, then the middle of it."""
        picture = torch.from_numpy(pixels[..., : 1 if self.mask else 3]).permute(2, 0, 1)
        high, wide = picture.shape[1:]
        height, width = self.plan.height, self.plan.width
        if (high, wide) == (height, width):
            return picture
        scale = max(width / wide, height / high)
        size = (round(scale * high), round(scale * wide))
        if size[0] * size[1] > MAX_VIDEO_SIDE**2:
            raise InputError(
                f"{self.flag} {self.path} is {wide}x{high}, which is too thin to be cut to {width}x{height}; "
                "give a video of about the same aspect"
            )
        # On the 8-bit frame, as official does: its rounding is part of the result, and nothing overshoots [-1, 1].
        picture = functional.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0]
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        return picture[:, top : top + height, left : left + width]

    def _normalised(self, picture: Tensor) -> Tensor:
        values = picture.float().div_(127.5).sub_(1.0)
        return values.add_(1.0).div_(2.0).clamp_(0.0, 1.0) if self.mask else values

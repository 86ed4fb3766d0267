"""H.264 video at 16 frames a second through PyAV, encoded frame by frame as the VAE finishes them; a PNG for one picture."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from wanvram.errors import OutputError

__all__ = ["FRAMES_PER_SECOND", "PictureWriter", "VideoWriter", "check_encoder"]

FRAMES_PER_SECOND = 16


def check_encoder() -> None:
    """OutputError unless a video can be encoded here."""
    try:
        import av
    except ImportError as error:
        raise OutputError("writing a video needs PyAV; install it with `pip install av`") from error
    if "libx264" not in av.codecs_available:
        raise OutputError("this PyAV was built without libx264; install the wheel from PyPI: `pip install av`")


class PictureWriter:
    """Writes the first frame it gets as PNG; the file gets its name only when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, frames: torch.Tensor) -> None:
        from PIL import Image

        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            Image.fromarray(frames[0].numpy()).save(partial, format="PNG")
            os.replace(partial, self.path)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class VideoWriter:
    """Writes uint8 frames [t, H, W, 3]; the file gets its name only when it is complete.

    Raises OutputError when the encoder or the disk refuses. Used as a context manager; leaving it with an error removes the
    partial file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._stream = None
        self.frames = 0
        import av

        try:
            self._container = av.open(str(self._partial), "w")
        except (OSError, av.FFmpegError) as error:
            raise OutputError(f"cannot write {path}: {error}") from error

    def write(self, frames: torch.Tensor) -> None:
        import av

        try:
            for picture in frames.numpy():
                if self._stream is None:
                    self._stream = self._container.add_stream("libx264", rate=FRAMES_PER_SECOND)
                    self._stream.height, self._stream.width = picture.shape[:2]
                    self._stream.pix_fmt = "yuv420p"
                    self._stream.options = {"crf": "18"}
                for packet in self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    self._container.mux(packet)
                self.frames += 1
        except (OSError, av.FFmpegError) as error:
            raise OutputError(f"cannot write {self.path}: {error}") from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        import av

        try:
            if kind is None and self._stream is not None:
                for packet in self._stream.encode():
                    self._container.mux(packet)
            self._container.close()
            if kind is None:
                os.replace(self._partial, self.path)
        except (OSError, av.FFmpegError) as error:
            raise OutputError(f"cannot write {self.path}: {error}") from error
        finally:
            self._partial.unlink(missing_ok=True)

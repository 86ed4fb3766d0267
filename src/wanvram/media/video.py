"""H.264 video at 16 frames a second through PyAV, encoded as the VAE finishes its frames; a PNG for one picture."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wanvram.errors import OutputError
from wanvram.output_files import whole_file

__all__ = ["FRAMES_PER_SECOND", "PictureWriter", "VideoWriter", "check_encoder"]

FRAMES_PER_SECOND = 16
MAX_WAITING = 16  # groups of up to 4 frames: 169 MiB at 1280x720


def check_encoder() -> None:
    """OutputError unless a video can be encoded here."""
    try:
        import av
    except ImportError as error:
        raise OutputError("writing a video needs PyAV; install it with `pip install av`") from error
    if "libx264" not in av.codecs_available:
        raise OutputError("this PyAV was built without libx264; install the wheel from PyPI: `pip install av`")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the encoder or the disk refuses inside is an OutputError."""
    import av

    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error


# x264's mbtree reads memory that nobody initialised where frames are few macroblocks wide (MALLOC_PERTURB_=85 changes the file):
# one such video in a hundred came out differently.
SMALL_PIXELS = 256 * 256


class PictureWriter:
    """Writes the first frame it gets as PNG; the file gets its name only when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, frames: torch.Tensor) -> None:
        from PIL import Image

        with _writing(self.path), whole_file(self.path) as partial:
            Image.fromarray(frames[0].numpy()).save(partial, format="PNG")

    def finish(self) -> None:
        """It was written at once."""

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class VideoWriter:
    """Writes uint8 frames [t, H, W, 3]; the file gets its name only when it is complete.

    A thread encodes while the device computes the next frames. Raises OutputError when the encoder or the disk refuses, at the
    next call. Used as a context manager; leaving it with an error removes the partial file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._stream: Any = None
        self.frames = 0
        self._finished = False
        import av

        with _writing(path):
            self._container = av.open(str(self._partial), "w")
        self._thread = ThreadPoolExecutor(1, "wanvram-video")
        self._waiting: deque[Future[None]] = deque()

    def write(self, frames: torch.Tensor) -> None:
        self._waiting.append(self._thread.submit(self._encode, frames))
        while len(self._waiting) > MAX_WAITING or (self._waiting and self._waiting[0].done()):
            self._next()

    def finish(self) -> None:
        """Every frame is encoded and in the file, which has its name once the writer is left."""
        if self._finished:
            return
        self._finished = True
        self._waiting.append(self._thread.submit(self._flush))
        while self._waiting:
            self._next()

    def _next(self) -> None:
        with _writing(self.path):
            self._waiting.popleft().result()

    def _encode(self, frames: torch.Tensor) -> None:
        import av

        for picture in frames.numpy():
            if self._stream is None:
                self._stream = self._container.add_stream("libx264", rate=FRAMES_PER_SECOND)
                self._stream.height, self._stream.width = picture.shape[:2]
                self._stream.pix_fmt = "yuv420p"
                self._stream.options = {"crf": "18"}
                if picture.shape[0] * picture.shape[1] < SMALL_PIXELS:
                    self._stream.options |= {"x264-params": "mbtree=0"}
            for packet in self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                self._container.mux(packet)
            self.frames += 1

    def _flush(self) -> None:
        if self._stream is not None:
            for packet in self._stream.encode():
                self._container.mux(packet)
        self._container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with _writing(self.path):
                if kind is None:
                    self.finish()
                self._thread.shutdown(cancel_futures=True)
                self._container.close()
                if kind is None:
                    os.replace(self._partial, self.path)
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._partial.unlink(missing_ok=True)

"""What a run makes: one or several videos or pictures, each with a sidecar JSON that says how to make it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanvram.config import MAX_NAME_BYTES, RunConfig
from wanvram.errors import InputError
from wanvram.input_files import whole
from wanvram.media.video import FRAMES_PER_SECOND, PictureWriter, VideoWriter, check_encoder
from wanvram.output_files import writing
from wanvram.record import write_json
from wanvram.request import Video
from wanvram.run.directory import RUN_FILES, prove_writable
from wanvram.version import __version__

__all__ = ["Outputs", "files_of"]

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")


def files_of(config: RunConfig, path: Path) -> list[Path]:
    """Of every video of the run, numbered from 001 when there are several."""
    count = len(config.videos())
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{n + 1:03d}{path.suffix}") for n in range(count)]


@dataclass
class Outputs:
    """Opens the writer of each prompt's frames. Existing files are replaced only with `force`.

    Raises InputError for a name that cannot be used and OutputError without an encoder, both before anything is loaded.
    """

    config: RunConfig
    directory: Path
    device: str
    save_file: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        is_picture = self.config.request.facts.makes_picture
        if not is_picture:
            check_encoder()
        if self.save_file is None:
            return
        if len(self.save_file.name.encode()) > MAX_NAME_BYTES:
            raise InputError(
                f"--save_file {self.save_file.name[:20]}...: its name is too long; at most {MAX_NAME_BYTES} bytes"
            )
        allowed = (".png",) if is_picture else VIDEO_SUFFIXES
        if self.save_file.suffix.lower() not in allowed:
            raise InputError(f"--save_file {self.save_file}: its name must end in {' or '.join(allowed)}")
        for video in map(self.path, range(len(self.videos))):
            description = video.with_suffix(".json")
            if description.name in RUN_FILES and whole(description.parent) == whole(self.directory):
                raise InputError(
                    f"--save_file {video}: its description {description.name} would replace a file of the run"
                )
            for path in (video, description):
                if path.is_dir():
                    raise InputError(f"--save_file {path} is a directory; name a file")
                if path.exists() and not self.force:
                    raise InputError(f"--save_file {path} exists; give --force to replace it")
        prove_writable(self.save_file.parent)

    @property
    def videos(self) -> tuple[Video, ...]:
        return self.config.videos()

    def path(self, index: int) -> Path:
        default = "image.png" if self.config.request.facts.makes_picture else "video.mp4"
        return files_of(self.config, self.save_file or self.directory / default)[index]

    def whole(self) -> tuple[int, ...]:
        """Numbers of the files that are there with their description, which is written last."""
        paths = [self.path(index) for index in range(len(self.videos))]
        return tuple(n for n, path in enumerate(paths) if path.is_file() and path.with_suffix(".json").is_file())

    def forget_earlier(self) -> None:
        """Where --force lets an earlier run's files be replaced, none of them may pass for this run's."""
        for index in range(len(self.videos)):
            with writing(description := self.path(index).with_suffix(".json")):
                description.unlink(missing_ok=True)

    @contextmanager
    def open(self, index: int, prompt: str) -> Iterator[VideoWriter | PictureWriter]:
        """The sink of the video with this index; the sidecar is written once the file is complete."""
        path = self.path(index)
        writer = PictureWriter(path) if self.config.request.facts.makes_picture else VideoWriter(path)
        with writer:
            yield writer
        sidecar = self._sidecar(path, prompt, self.videos[index])
        write_json(path.with_suffix(".json"), sidecar)

    def _sidecar(self, path: Path, prompt: str, video: Video) -> dict[str, Any]:
        request = self.config.request
        return {
            "schema": 1,
            "file": path.name,
            "prompt": prompt,
            "prompt_given": request.all_prompts()[video.prompt],
            "negative_prompt": request.negative_prompt,
            "seed": video.seed,
            "frames_per_second": None if request.facts.makes_picture else FRAMES_PER_SECOND,
            "wanvram": __version__,
            "torch": torch.__version__,
            "device": self.device,
            "config": self.config.to_dict(),
        }

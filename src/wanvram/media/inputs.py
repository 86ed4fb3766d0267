"""The files of a request become the pipeline's Inputs, checked before any model is loaded; without files, stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wanvram.engine.conditions import Frames, Inputs
from wanvram.errors import InputError
from wanvram.media.sources import (
    MAX_PICTURE_PIXELS,
    FramePlan,
    SourceVideo,
    picture_size,
    plan_frames,
    probe_video,
    read_picture,
)
from wanvram.request import Request

__all__ = ["prepare_inputs"]

MOST_TOKENS = 1024  # along a side: as far as the official transformer's positions go


def prepare_inputs(request: Request, *, simulated: bool, real_weights: bool) -> tuple[Inputs, list[str]]:
    """Inputs and what is to be said about them. `simulated`: only sizes are read, tensors hold no values.

    Raises InputError for a file that is missing, unreadable or of an impossible size, and for pictures that a real
    checkpoint needs and that were not given.
    """
    if request.facts.pictures:
        return _from_pictures(request, simulated, real_weights)
    if request.facts.takes_source:
        return _from_source(request, simulated)
    return Inputs(request.frame_num, request.height, request.width, geometry=request.geometry), []


def _from_pictures(request: Request, simulated: bool, real_weights: bool) -> tuple[Inputs, list[str]]:
    names, token = request.facts.pictures, request.geometry.token_side
    paths = [getattr(request, name) for name in names]
    if None not in paths:
        pictures = [_picture(Path(path), "--" + name, simulated) for name, path in zip(names, paths, strict=True)]
        notes = []
    elif real_weights:
        flags = " and ".join("--" + name for name in names)
        raise InputError(f"{flags}: {request.task} makes a video from it; give a picture")
    else:
        size = (request.height, request.width, 3)
        pictures = [_blank(size, simulated) for _ in names]
        notes = [f"no picture was given: a grey one of {request.width}x{request.height} stands in"]
    _check_last(pictures, paths)
    height, width = pictures[0].shape[:2]
    width, height = request.video_size((width, height))
    if min(width, height) < token or max(width, height) > MOST_TOKENS * token:
        raise InputError(
            f"--{names[0]} {paths[0]} is too long and thin: a video of its shape within the area of {request.size} would be "
            f"{width}x{height}; sides must be {token} to {MOST_TOKENS * token} pixels"
        )
    if (width, height) != (request.width, request.height):
        notes.append(f"the video is {width}x{height}: the picture's aspect ratio within the area of {request.size}")
    return Inputs(request.frame_num, height, width, tuple(pictures), geometry=request.geometry), notes


def _check_last(pictures: list[Tensor], paths: list[str]) -> None:
    """The last frame is scaled until it covers the first: InputError if that would be a giant."""
    sizes = [picture.shape[:2] for picture in pictures]
    (height, width), (last_height, last_width) = sizes[0], sizes[-1]
    scale = max(height / last_height, width / last_width)
    if scale > 1 and last_height * last_width * scale**2 > MAX_PICTURE_PIXELS:
        raise InputError(
            f"--last_frame {paths[-1]} is {last_width}x{last_height}, of too different a shape to be cut to the first frame's "
            f"{width}x{height}; give pictures of about the same shape"
        )


def _from_source(request: Request, simulated: bool) -> tuple[Inputs, list[str]]:
    references = [_picture(Path(path), "--src_ref_images", simulated) for path in request.src_ref_images]
    if request.src_video is None:
        inputs = Inputs(request.frame_num, request.height, request.width, geometry=request.geometry)
        return _with_references(inputs, references, simulated), []
    path = Path(request.src_video)
    info = probe_video(path, "--src_video")
    mask_path = Path(request.src_mask) if request.src_mask else None
    if mask_path is not None:
        info = replace(info, frames=min(info.frames, probe_video(mask_path, "--src_mask").frames))
    plan = plan_frames(info, request.width * request.height, request.geometry)
    frames = len(plan.frame_ids)
    source: Frames = SourceVideo(path, plan).chunks
    mask = None if mask_path is None else SourceVideo(mask_path, plan, mask=True).chunks
    if simulated:
        source = lambda: _pieces(3, plan)  # noqa: E731
        mask = mask and (lambda: _pieces(1, plan))
    notes = [f"the video is {plan.width}x{plan.height} with {frames} frames, after {path.name}"]
    inputs = Inputs(frames, plan.height, plan.width, source=source, mask=mask, geometry=request.geometry)
    return _with_references(inputs, references, simulated), notes


def _with_references(inputs: Inputs, references: list[Tensor], simulated: bool) -> Inputs:
    """Simulated ones have the size of the video from the start, which they are brought to on the host."""
    if simulated:
        references = [_blank((inputs.height, inputs.width, 3), simulated) for _ in references]
    return replace(inputs, references=tuple(references))


def _picture(path: Path, flag: str, simulated: bool) -> Tensor:
    if not simulated:
        return read_picture(path, flag)
    width, height = picture_size(path, flag)
    return _blank((height, width, 3), simulated)


def _blank(shape: tuple[int, int, int], simulated: bool) -> Tensor:
    return torch.full(shape, 127, dtype=torch.uint8, device="meta" if simulated else "cpu")


def _pieces(channels: int, plan: FramePlan) -> Iterator[Tensor]:
    """Shapes of a source's pieces: 1, 4, 4, ... frames."""
    for count in plan.geometry.pieces(len(plan.frame_ids)):
        yield torch.empty((channels, count, plan.height, plan.width), device="meta")

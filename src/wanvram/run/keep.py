"""What a run that makes videos keeps in its directory, and how another goes on with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from wanvram import knobs
from wanvram.engine.keeping import Keeper
from wanvram.engine.pipeline import Pipeline
from wanvram.errors import InputError
from wanvram.input_files import open_regular
from wanvram.kept_state import KEPT_NAME, KeptRun, KeptVideo, read_kept_videos, write_kept
from wanvram.record import Resumed
from wanvram.request import MEDIA
from wanvram.run.directory import left_half_written
from wanvram.run.outputs import Outputs
from wanvram.run.resume import Resumption, asked, refuse_difference
from wanvram.sampling import Solver, held_after
from wanvram.version import __version__
from wanvram.weights.folder import GENERATED
from wanvram.weights.official import tokenizer_file

__all__ = ["follow", "keep_in", "kept_before"]

# Of a large file this much is read, evenly spread: another checkpoint differs everywhere, and a disk of spinning plates needs 10 ms each.
SAMPLES, SAMPLE_BYTES = 16, 4096
# Where generated weights are made decides their values: a GPU draws other numbers than a CPU.
_WHERE_MADE = (knobs.LOAD_STRATEGY, knobs.T5_CPU, knobs.WEIGHTS_IN, knobs.RESIDENT_BLOCKS)


def keep_in(directory: Path, pipeline: Pipeline, outputs: Outputs, resumption: Resumption | None) -> Resumed | None:
    """Gives the pipeline a keeper that writes there, with what an earlier process made of the run; says what that was.

    InputError where the run is no longer the same, or what was kept cannot be used.
    """
    config, path = pipeline.config, directory / KEPT_NAME
    kept = resumption.kept if resumption is not None else None
    made_of = asked(config) | _found(pipeline)
    videos: list[KeptVideo] = []
    if kept is not None:
        refuse_difference(directory, kept.made_of, made_of)
        videos = _videos(path, pipeline)
    save_file = None if outputs.save_file is None else str(outputs.save_file)
    run = KeptRun(os.getcwd(), save_file, made_of)
    for file in left_half_written(directory):
        file.unlink(missing_ok=True)
    if kept is None:
        write_kept(path, run, [])

    def write(now: Sequence[KeptVideo], prompts: Sequence[str], step_seconds: float | None) -> None:
        write_kept(path, replace(run, prompts=tuple(prompts), step_seconds=step_seconds), now)

    pipeline.keeper = Keeper(write, config.measurement.keep_every, videos, kept.prompts if kept is not None else ())
    if resumption is None:
        outputs.forget_earlier()
        return None
    pipeline.whole = outputs.whole()
    steps = {video.number: video.steps for video in videos}
    return Resumed(tuple(steps.get(n, 0) for n in range(len(config.videos()))), tuple(pipeline.whole))


def follow(directory: Path, pipeline: Pipeline, resumption: Resumption) -> None:
    """Gives the pipeline of one of several processes, not the first, what an earlier run made; the first keeps what comes."""
    if resumption.kept is not None:
        pipeline.keeper = Keeper(kept=_videos(directory / KEPT_NAME, pipeline), prompts=resumption.kept.prompts)


def kept_before(resumed: Resumed, steps: int) -> str:
    """A note of the record."""
    made = f"{sum(resumed.steps)} of {steps * len(resumed.steps)} steps"
    whole = f" and {len(resumed.whole)} of {len(resumed.steps)} videos" if resumed.whole else ""
    return f"the run was resumed: {made}{whole} were made before; stages, times and peaks are of the last process alone"


def _videos(path: Path, pipeline: Pipeline) -> list[KeptVideo]:
    """Every one that is begun. InputError where they are not of this run."""
    request, count = pipeline.config.request, len(pipeline.config.videos())
    solver, steps = cast(Solver, request.sample_solver), request.sample_steps
    videos = read_kept_videos(path, tuple(pipeline.inputs.noise_shape))
    for video in videos:
        if video.number >= count or video.steps > steps:
            raise InputError(
                f"{path} tells of step {video.steps} of video {video.number + 1}; this run has {steps} steps of {count} videos. "
                "Without that file the run begins again: remove it"
            )
        lacking = set(held_after(solver, video.steps, steps)) - set(video.tensors)
        if lacking:
            raise InputError(
                f"{path} lacks '{min(lacking)}' of video {video.number + 1}, which {solver} needs after step {video.steps}. "
                "Without that file the run begins again: remove it"
            )
    return videos


def _found(pipeline: Pipeline) -> dict[str, Any]:
    """What the video depends on beside the configuration: program, device, and what is in the files."""
    config = pipeline.config
    found: dict[str, Any] = {"the version of wanvram": __version__, "the version of torch": str(torch.__version__)}
    found["the device"] = pipeline.device.name
    for name in MEDIA:
        given = getattr(config.request, name)
        if given:
            found[f"what --{name} names"] = _contents([given] if isinstance(given, str) else given)
    if config.weights not in GENERATED:
        for model in config.request.facts.components():
            source = pipeline.weights.source(model.name)
            assert source is not None
            found[f"what is in the files of the {model.name}"] = _contents(source.files())
        found["what is in the tokenizer's file"] = _contents([tokenizer_file(Path(config.weights))])
    elif pipeline.device.kind == "cuda":
        found |= {knob.flag: knob.of(config.strategy) for knob in _WHERE_MADE}
    return found


def _contents(paths: Iterable[str | Path]) -> str:
    """Bytes in all, and a digest of the sizes and of what is in the files, samples of large ones."""
    total, digest = 0, hashlib.sha256()
    for path in map(Path, paths):
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            total += size
            digest.update(size.to_bytes(8, "little"))
            for place, length in _samples(size):
                file.seek(place)
                digest.update(file.read(length))
    return f"{total:,} bytes, {digest.hexdigest()[:16]}"


def _samples(size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes): everything, or as much evenly from the first to the last byte."""
    if size <= 256 * SAMPLES * SAMPLE_BYTES:
        yield 0, size
        return
    for number in range(SAMPLES):
        yield number * (size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES

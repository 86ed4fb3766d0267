"""Where a run's weights come from: an official checkpoint, seeded random numbers at full size, a tiny model, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wanvram.errors import CheckpointError
from wanvram.specs import T5Spec
from wanvram.tasks import TASKS
from wanvram.weights.folder import GENERATED, existing_folder
from wanvram.weights.official import check_checkpoint, tokenizer_file
from wanvram.weights.random import RandomSource
from wanvram.weights.recognise import explain
from wanvram.weights.sources import TensorSource
from wanvram.weights.tokenizer import ByteTokenizer, Tokenizer, UMT5Tokenizer

__all__ = ["GeneratedWeights", "NoWeights", "OfficialWeights", "check_weights", "choose_weights"]


class OfficialWeights:
    """A checkpoint directory in one of its layouts. sources: as they were opened to be checked."""

    tiny = False

    def __init__(self, directory: Path, sources: Mapping[str, TensorSource]) -> None:
        self._tokenizer = UMT5Tokenizer(tokenizer_file(directory))
        self._sources = sources

    def source(self, component: str) -> TensorSource:
        return self._sources[component]

    def tokenizer(self, spec: T5Spec) -> Tokenizer:
        return self._tokenizer

    def shapes_for(self, component: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """A checkpoint knows its own shapes."""


class NoWeights:
    """The simulated device: sizes only. Text is tokenised by the byte-level stand-in."""

    def __init__(self, *, tiny: bool) -> None:
        self.tiny = tiny

    def source(self, component: str) -> TensorSource | None:
        return None

    def tokenizer(self, spec: T5Spec) -> Tokenizer:
        return ByteTokenizer(spec.vocab_size)

    def shapes_for(self, component: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Nothing is generated."""


class GeneratedWeights(NoWeights):
    """Seeded random values, written straight into the parameters on their device."""

    def __init__(self, seed: int, *, tiny: bool) -> None:
        super().__init__(tiny=tiny)
        self.seed = seed
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def source(self, component: str) -> TensorSource:
        return RandomSource(self._shapes[component], self.seed)

    def shapes_for(self, component: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes[component] = dict(shapes)


def choose_weights(weights: str, *, simulated: bool, task: str, seed: int = 0) -> OfficialWeights | NoWeights:
    """`random`, `tiny` or a checkpoint directory, whose files are checked for everything the task needs."""
    if simulated:
        if weights not in GENERATED and os.path.isdir(weights):
            _refuse_what_is_no_checkpoint(weights, task)
        return NoWeights(tiny=weights == "tiny")
    if weights in GENERATED:
        return GeneratedWeights(seed, tiny=weights == "tiny")
    return OfficialWeights(Path(weights), check_weights(weights, task))


def check_weights(weights: str, task: str) -> dict[str, TensorSource]:
    """The sources of every component that the task needs, of a checkpoint directory; only headers are read. CheckpointError.

    Nothing to check where weights are generated.
    """
    if weights in GENERATED:
        return {}
    try:
        directory = existing_folder(weights)
    except CheckpointError as error:
        raise explain(Path(weights), error) from error
    return check_checkpoint(directory, [model.name for model in TASKS[task].components()], TASKS[task].dit)


def _refuse_what_is_no_checkpoint(weights: str, task: str) -> None:
    """The simulated device needs no weights; a folder that is known to be something else is refused as on a GPU."""
    try:
        check_weights(weights, task)
    except CheckpointError as error:
        nothing = CheckpointError("")
        if explain(Path(weights), nothing) is not nothing:
            raise error

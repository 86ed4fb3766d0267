"""A run's prediction, made in a process of its own while the run starts, so that every video has its figures beside what they became."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from wanvram.config import RunConfig
from wanvram.errors import WanvramError
from wanvram.machine.host import since_process_start
from wanvram.machine.nvml import first_gpu
from wanvram.record import Predicted
from wanvram.simulate.gpus import find_gpu

__all__ = ["Beside", "Predict"]

LEAST_CORES = 4  # with fewer, the simulation would slow down what it predicts
MOST_SECONDS = 3.0  # that the end of a short run waits for its prediction, which takes 2 to 12 s from the start

Predict = Callable[[RunConfig], Predicted | None]


class Beside:
    """To be made before CUDA starts, which no fork survives. `predict` answers for a configuration for a card."""

    def __init__(self, config: RunConfig, predict: Predict) -> None:
        self._answer: Connection | None = None
        if not hasattr(os, "fork") or (os.cpu_count() or 1) < LEAST_CORES or torch.cuda.is_initialized():
            return
        context = multiprocessing.get_context("fork")
        self._answer, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_predict, args=(config, predict, theirs), daemon=True)
        process.start()
        theirs.close()

    def result(self) -> Predicted | None:
        """None where nothing could be predicted, such as a card that is not known."""
        if self._answer is None or not self._answer.poll(MOST_SECONDS):
            return None
        try:
            found: Predicted | None = self._answer.recv()
        except (EOFError, OSError):
            return None
        return found


def _predict(config: RunConfig, predict: Predict, answer: Connection) -> None:
    """In the forked process."""
    elapsed = since_process_start(os.getppid())
    try:
        gpu = first_gpu()
        card = find_gpu(gpu.name, gpu.memory()[1])
        found = predict(replace(config, device="simulated", gpu=card.argument))
    except WanvramError:
        found = None
    if found is not None and found.seconds is not None:
        found = replace(found, seconds=found.seconds + elapsed)
    answer.send(found)

"""Starts the processes of a run on several GPUs of this machine, as `torchrun --standalone --nproc_per_node N` does, with its agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from wanvram.config import RunConfig
from wanvram.errors import DeviceError
from wanvram.knobs import gpus
from wanvram.progress_stream import ProgressStream
from wanvram.recorder.interrupts import ENDINGS
from wanvram.run.execute import device_kind

__all__ = ["start"]


def start(config: RunConfig, words: Sequence[str]) -> int:
    """Runs `wanvram WORDS` once for each GPU of the configuration; the exit code of all. DeviceError: there are not as many GPUs.

    The first process speaks for all; here only what it cannot say itself is said.
    """
    count = gpus(config.strategy)
    if device_kind(config) == "cuda" and torch.cuda.device_count() < count:
        raise DeviceError(
            f"{count} GPUs are asked for and {torch.cuda.device_count()} are here; give --gpus {torch.cuda.device_count()} or "
            "fewer, or show more of them in CUDA_VISIBLE_DEVICES"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with _own_signals():
            elastic_launch(_agent(count), sys.executable)("-m", "wanvram", *words)
    except ChildFailedError as error:
        _tell(error.failures)
        return _exit_code(error.failures)
    except SignalException:  # the agent has passed it on, and everybody has ended
        return 1
    return 0


def _agent(count: int) -> LaunchConfig:
    """What --standalone stands for. Nothing is started again: a run that failed goes on with --resume."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """The agent takes these for itself and does not give them back."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDINGS)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in usual.items():
                signal.signal(number, handler)


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """The first one's, which has everybody's record; else the highest that a process chose itself."""
    codes = {rank: failure.exitcode for rank, failure in failures.items() if failure.exitcode > 0}
    return codes.get(0, max(codes.values(), default=1))


def _tell(failures: Mapping[int, ProcessFailure]) -> None:
    first = failures.get(0)
    if first is not None and first.exitcode < 0 and -first.exitcode != signal.SIGTERM:
        said = f"rank 0 was ended by {first.signal_name()}; what was recorded is kept"
        ProgressStream(sys.stderr).write(f"wanvram: {said}\n")

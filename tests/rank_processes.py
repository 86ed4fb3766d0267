"""Several processes joined by gloo, as ranks of one run, for tests on the CPU."""

from __future__ import annotations

import atexit
import fcntl
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["on_ranks", "once"]

SECONDS = 800  # on two cores that other workers use, too


def once(name: str, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, computed by one of the workers of a test session (pytest -n) for all of them."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if session is None:
        return compute()
    path = Path(tempfile.gettempdir()) / f"wanvram-{session}-{name}.pt"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            torch.save(compute(), path)
            atexit.register(path.unlink, missing_ok=True)
            atexit.register(path.with_suffix(".lock").unlink, missing_ok=True)
        return torch.load(path, weights_only=False)


def on_ranks(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)`, a module's function, returns in each of `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, count, folder, work, arguments), daemon=True)
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        for process in processes:
            process.kill()
        assert not failed, "\n".join(_said(Path(folder) / f"{rank}.txt", rank) for rank in failed)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _said(path: Path, rank: int) -> str:
    return f"rank {rank}: {path.read_text() if path.exists() else 'no word'}"


def _rank(rank: int, count: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS))
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        sys.exit(1)

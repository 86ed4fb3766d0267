"""What holds for every test: one torch thread, fixed seeds, reproducible property tests, no gpu test without CUDA."""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# No deadline: a shared 2-core machine is slow at random. derandomize: CI must not find a new example by luck.
settings.register_profile("wanvram", deadline=None, derandomize=True)
settings.load_profile("wanvram")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked gpu on a machine without CUDA."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_gpu_test_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """A lock across workers: two tests on one card would change each other's device memory.

    xdist_group would say the same, but pytest-xdist 3.8.0 does not see groups under pytest 9.2.
    """
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    with (Path(tempfile.gettempdir()) / f"wanvram-gpu-tests-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def seed() -> int:
    """Python, NumPy and torch start every test from the same seed, so that the order of tests never matters."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, for a test that must not depend on how often others draw."""
    return torch.Generator().manual_seed(seed)

"""What holds for every test: one torch thread, fixed seeds, reproducible property tests, no gpu test without CUDA."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# No deadline: a shared 2-core machine is slow at random. derandomize: CI must not find a new example by luck.
settings.register_profile("wanvram", deadline=None, derandomize=True)
settings.load_profile("wanvram")


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped without CUDA; with it they share one xdist worker, since they measure one card."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    cuda = torch.cuda.is_available()
    parallel = config.pluginmanager.hasplugin("xdist")
    for item in gpu_items:
        if not cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif parallel:
            item.add_marker(pytest.mark.xdist_group("gpu"))


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

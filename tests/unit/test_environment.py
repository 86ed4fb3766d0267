"""Which card is asked for its free memory: the first that CUDA sees, by index or UUID, through a made-up NVML."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from wanvram.errors import DeviceError
from wanvram.machine.nvml import first_gpu

CARDS = ("GPU-aa11", "GPU-ab22", "GPU-cc33")


class NVMLError(Exception):
    pass


def handle_of(uuid: str) -> str:
    if uuid != "MIG-77":
        raise NVMLError("not found")
    return uuid


@pytest.fixture(autouse=True)
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th card has n bytes free, a MIG slice 7."""
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(CARDS),
        nvmlDeviceGetHandleByIndex=lambda index: CARDS[index],
        nvmlDeviceGetHandleByUUID=handle_of,
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(
            free=7 if handle == "MIG-77" else CARDS.index(handle), total=10
        ),
        nvmlDeviceGetName=lambda handle: handle,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_without_a_setting_the_first_card_is_asked() -> None:
    assert (*first_gpu().memory(), first_gpu().name) == (0, 10, "GPU-aa11")


@pytest.mark.parametrize(
    ("visible", "free"),
    [
        ("1", 1),
        (" 2 , 0", 2),
        ("0", 0),
        ("1,-1", 1),
        ("GPU-cc33", 2),
        ("GPU-ab", 1),
        ("GPU-c,GPU-aa11", 2),
        ("MIG-77", 7),
    ],
)
def test_the_first_visible_card_is_asked(visible: str, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert first_gpu().memory()[0] == free


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "3", "GPU-a", "GPU-dd", "NoDevFiles"])
def test_no_visible_card_is_one_sentence(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=r"which shows none of the 3 GPUs here; .* --vram 8GiB"):
        first_gpu()


def test_a_slice_that_does_not_exist_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    with pytest.raises(DeviceError, match="not found"):
        first_gpu()

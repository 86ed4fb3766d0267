"""What CudaDevice makes of the driver's answers, without a GPU."""

from __future__ import annotations

import pytest
import torch

from wanvram.engine import devices
from wanvram.engine.devices import LIBRARY_MODULES, CudaDevice, _own_pages
from wanvram.errors import OutOfMemory
from wanvram.units import GIB, MIB

PYTORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 1.41 GiB. GPU 0 has a total capacity of 139.80 GiB of which 600.00 MiB is free. "
    "Including non-PyTorch memory, this process has 4.10 GiB memory in use."
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """3 GiB allocated, 4 GiB reserved, a context of 600 MiB."""
    stats = {"allocated_bytes.all.current": 3 * GIB, "reserved_bytes.all.current": 4 * GIB}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _device: stats)
    monkeypatch.setattr(CudaDevice, "_context_bytes", 600 * MIB)
    made = object.__new__(CudaDevice)
    made.torch_device = torch.device("cuda")
    made.limit_bytes = None
    return made


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (nbytes, 140 * GIB))


def caught(device: CudaDevice, error: Exception) -> OutOfMemory:
    with pytest.raises(OutOfMemory) as failure, device.session():
        raise error
    return failure.value


def test_the_sentence_says_how_much_was_asked_for_and_who_holds_the_rest(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 600 * MIB)
    error = caught(device, torch.OutOfMemoryError(PYTORCH_SAYS))
    others = (140 - 4) * GIB - (600 + 600) * MIB - LIBRARY_MODULES
    assert str(error) == (
        "CUDA out of memory: 1,443.8 MiB more asked for with 3.00 GiB allocated and 4.00 GiB reserved of 140.00 GiB; "
        f"600.0 MiB of the GPU are free, other processes hold {others / GIB:.2f} GiB."
    )
    assert (error.requested_bytes, error.reserved_bytes) == (int(1.41 * GIB), 4 * GIB)


def test_alone_on_the_card_nobody_else_is_named(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 136 * GIB - 650 * MIB)
    device.limit_bytes = 5 * GIB
    assert str(caught(device, torch.OutOfMemoryError(PYTORCH_SAYS))).endswith("4.00 GiB reserved of 5.00 GiB.")


@pytest.mark.parametrize(
    "message", ["CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "CUDA error: out of memory"]
)
def test_a_library_without_memory_is_out_of_memory_too(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    free(monkeypatch, MIB)
    error = caught(device, RuntimeError(message))
    assert str(error).startswith("CUDA out of memory: memory for a library asked for with")
    assert error.requested_bytes == 0


def test_any_other_error_stays_what_it_is(device: CudaDevice) -> None:
    with pytest.raises(RuntimeError, match="shapes"), device.session():
        raise RuntimeError("shapes do not match")


def test_libraries_that_are_loaded_already_are_not_counted_twice(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 2 * GIB)
    monkeypatch.setattr(CudaDevice, "_context_bytes", 0)
    for used, outside in ((600 * MIB, 600 * MIB + LIBRARY_MODULES), (670 * MIB, 600 * MIB + LIBRARY_MODULES)):
        device.meter = type("Meter", (), {"device_memory": lambda _self, used=used: 2 * GIB + used})()
        assert device._outside() == outside


def test_pinned_memory_starts_as_pages_of_its_own_that_can_be_written() -> None:
    pages = _own_pages(3 * MIB + 5)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    assert tensor.numel() == 3 * MIB + 5
    assert not tensor.any()
    tensor.fill_(7)
    assert pages[-1] == 7


def test_a_cap_ends_with_the_next_device_that_has_none_and_only_if_it_was_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(CudaDevice, "_capped", set())
    monkeypatch.setattr(CudaDevice, "_outside", lambda _self: 0)
    monkeypatch.setattr(devices, "CudaMeter", lambda _index: None)
    fakes = {
        "is_available": lambda: True,
        "set_device": lambda _index: None,
        "get_device_name": lambda _index: "card",
        "mem_get_info": lambda _index: (4 * GIB, 4 * GIB),
        "set_per_process_memory_fraction": lambda fraction, _index: fractions.append(fraction),
        "Stream": lambda _index: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for limit in (None, GIB, None, None):
        CudaDevice(limit_bytes=limit)
    assert fractions == [0.25, 1.0]

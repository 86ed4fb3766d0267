"""What CudaDevice makes of the driver's answers, without a GPU."""

from __future__ import annotations

import pytest
import torch

from wanvram.engine import cuda
from wanvram.engine.cuda import CudaDevice, own_pages
from wanvram.errors import BudgetError, OutOfMemory
from wanvram.machine.driver import LATER_BYTES, PageTables, page_table_bytes
from wanvram.units import GIB, MIB

PYTORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 1.41 GiB. GPU 0 has a total capacity of 139.80 GiB of which 600.00 MiB is free. "
    "Including non-PyTorch memory, this process has 4.10 GiB memory in use."
)


class FakeMeter:
    """`device` bytes lost by the card, `others` used by somebody else."""

    device_name = "cuda:card"

    def __init__(self) -> None:
        self.tables, self.pinned_bytes = PageTables(), 0
        self.device, self.others = 4 * GIB + 600 * MIB, 0

    def device_memory(self) -> int:
        return self.device

    def used_by_others(self) -> int:
        return self.others

    def pinned(self, change: int) -> None:
        self.pinned_bytes += change
        self.tables.update(self.pinned_bytes)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """3 GiB allocated, 4 GiB reserved."""
    stats = {"allocated_bytes.all.current": 3 * GIB, "reserved_bytes.all.current": 4 * GIB}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _device: stats)
    made = object.__new__(CudaDevice)
    made.meter = FakeMeter()  # type: ignore[assignment]
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
    others = device.meter.others = 134 * GIB  # type: ignore[attr-defined]
    error = caught(device, torch.OutOfMemoryError(PYTORCH_SAYS))
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


@pytest.fixture
def caps(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every cap that is set, in bytes of a card of 128 GiB, of which 4 GiB are reserved and 600 MiB lie outside the allocator."""
    set_to: list[int] = []
    fakes = {
        "mem_get_info": lambda _device: (0, 128 * GIB),
        "memory_reserved": lambda _device: 4 * GIB,
        "set_per_process_memory_fraction": lambda fraction, _index: set_to.append(round(fraction * 128 * GIB)),
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    device.torch_device = torch.device("cuda", 0)
    device.limit_bytes = 8 * GIB
    device.hold_to_limit()
    return set_to


def test_the_cap_is_the_limit_less_what_lies_outside_the_allocator(caps: list[int]) -> None:
    assert caps == [8 * GIB - 600 * MIB - LATER_BYTES]


def test_the_cap_gives_way_to_page_tables_before_memory_is_pinned(device: CudaDevice, caps: list[int]) -> None:
    device._make_room_for_tables(16 * GIB)
    device.meter.pinned(16 * GIB)
    assert caps[-1] == caps[0] - page_table_bytes(16 * GIB) == caps[0] - 32 * MIB
    device._make_room_for_tables(1)  # within the tables there are: nothing changes
    assert len(caps) == 2


@pytest.mark.usefixtures("caps")
def test_page_tables_without_room_are_out_of_memory_before_anything_is_pinned(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 7 * GIB + 400 * MIB)
    with pytest.raises(OutOfMemory, match=r"32\.0 MiB more asked for"):
        device._make_room_for_tables(16 * GIB)


@pytest.mark.usefixtures("caps")
def test_a_limit_below_context_and_libraries_is_a_budget_error(device: CudaDevice) -> None:
    device.limit_bytes = 600 * MIB
    with pytest.raises(
        BudgetError, match=r"600\.0 MiB cannot hold the CUDA context and libraries, which take 604\.0 MiB"
    ):
        device.hold_to_limit()


@pytest.mark.parametrize(
    ("pinned_mib", "tables_mib"),
    [(0, 0), (610, 0), (1122, 2), (2146, 4), (4194, 8), (5194, 10), (9214, 18), (8832.5, 16), (27602.9, 54)],
)
def test_page_tables_are_those_measured_beside_an_h200(pinned_mib: float, tables_mib: int) -> None:
    assert page_table_bytes(int(pinned_mib * MIB)) == tables_mib * MIB


def test_a_little_of_the_page_tables_stays_when_memory_is_unpinned() -> None:
    tables = PageTables()
    for pinned_mib, held_mib in ((27602, 54), (26807, 54), (2048, 8), (0, 4), (1232, 4), (2738, 4), (0, 4), (8832, 16)):
        tables.update(pinned_mib * MIB)
        assert tables.held_bytes == held_mib * MIB


def test_pinned_memory_starts_as_pages_of_its_own_that_can_be_written() -> None:
    pages = own_pages(3 * MIB + 5)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    assert tensor.numel() == 3 * MIB + 5
    assert not tensor.any()
    tensor.fill_(7)
    assert pages[-1] == 7


def test_a_cap_ends_with_the_next_device_that_has_none_and_only_if_it_was_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(CudaDevice, "_capped", set())
    meter = FakeMeter()
    meter.device = 3 * GIB + LATER_BYTES  # with the reserve for later modules: 3 of 4 GiB
    monkeypatch.setattr(cuda, "CudaMeter", lambda _index: meter)
    fakes = {
        "is_available": lambda: True,
        "set_device": lambda _index: None,
        "memory_reserved": lambda _device: 3 * GIB + 2 * LATER_BYTES,
        "synchronize": lambda _index: None,
        "mem_get_info": lambda _index: (4 * GIB, 4 * GIB),
        "set_per_process_memory_fraction": lambda fraction, _index: fractions.append(fraction),
        "Stream": lambda _index: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for limit in (None, GIB, None, None):
        CudaDevice(limit_bytes=limit)
    assert fractions == [pytest.approx((GIB - LATER_BYTES) / (4 * GIB)), 1.0]

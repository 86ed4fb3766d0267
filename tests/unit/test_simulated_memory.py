"""The simulated device: storages born and dead, host or device, library buffers by card, and the limit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wanvram.config import Request, RunConfig
from wanvram.engine.devices import SimulatedDevice
from wanvram.errors import OutOfMemory
from wanvram.kernels.scaled_attention import attention
from wanvram.machine.driver import LATER_BYTES
from wanvram.predict.simulate import simulated_device
from wanvram.simulate.gpus import GPUS
from wanvram.units import GIB, MIB

MEBI_FLOATS = (512, 512)  # fp32: exactly 1 MiB


def simulated(gpu: str = "h200", limit_bytes: int | None = None) -> SimulatedDevice:
    request = Request.for_task("t2v-1.3B")
    config = RunConfig("x", "", "simulated", request, gpu=gpu, memory_limit_bytes=limit_bytes)
    return simulated_device(config, keep_events=True)


def allocated(device: SimulatedDevice) -> int:
    return device.memory.read().allocated_bytes


def sizes(device: SimulatedDevice, start: int = 0) -> list[int]:
    """Bytes of every allocator call from the start-th on; a free is negative."""
    assert device.memory.events is not None
    return [event.nbytes for event in device.memory.events[start:]]


def outside(gpu: str) -> int:
    """What a limit has to leave to the CUDA context and all libraries."""
    return GPUS[gpu].context_bytes + sum(GPUS[gpu].module_bytes.values())


# --- lifetimes -------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_however_many_views_it_has_and_until_the_last_is_gone() -> None:
    device = simulated()
    with device.session():
        x = device.empty(MEBI_FLOATS, torch.float32)
        views = [x.view(-1), x.t(), x[1:], x.unsqueeze(0).expand(9, -1, -1)]
        assert allocated(device) == MIB
        del x
        assert allocated(device) == MIB
        views.clear()
        assert allocated(device) == 0
    assert sizes(device) == [MIB, -MIB]


def test_a_freed_storage_stays_reserved_until_the_cache_is_emptied() -> None:
    device = simulated()
    with device.session():
        x = device.empty((4, *MEBI_FLOATS), torch.float32)
        assert device.memory.read().reserved_bytes == 20 * MIB
        del x
        assert (allocated(device), device.memory.read().reserved_bytes) == (0, 20 * MIB)
        device.empty_cache()
        assert device.memory.read().reserved_bytes == 0


def test_an_operation_in_place_takes_nothing_and_one_out_of_place_its_output() -> None:
    device = simulated()
    with device.session():
        x = device.empty(MEBI_FLOATS, torch.float32)
        x.mul_(2)
        assert sizes(device) == [MIB]
        y = x * 2
        assert sizes(device) == [MIB, MIB]
        del y


def test_the_peak_keeps_what_is_gone_until_it_is_reset() -> None:
    device = simulated()
    with device.session():
        x = device.empty(MEBI_FLOATS, torch.float32)
        del x
        assert device.memory.peak().allocated_bytes == MIB
        device.memory.reset_peak()
        assert device.memory.peak().allocated_bytes == 0


# --- host and device -------------------------------------------------------------------------------------------------


def test_host_tensors_and_what_is_computed_from_them_do_not_count_on_the_device() -> None:
    device = simulated()
    with device.session():
        plain = device.host_empty(MEBI_FLOATS, torch.float32)
        pinned = device.host_empty(MEBI_FLOATS, torch.float32, pinned=True)
        total = plain + pinned
        assert (allocated(device), device.memory.host()) == (0, (3 * MIB, MIB))
        del plain, pinned, total
        assert device.memory.host() == (0, 0)
        assert device.memory.host_peak_bytes == 3 * MIB
    assert sizes(device) == []


def test_an_upload_counts_on_the_device_and_a_download_on_the_host() -> None:
    device = simulated()
    with device.session():
        host = device.host_empty(MEBI_FLOATS, torch.float32)
        x = device.upload(host)
        assert (allocated(device), device.memory.host()[0]) == (MIB, MIB)
        back = device.download(x)
        assert (allocated(device), device.memory.host()[0]) == (MIB, 2 * MIB)
        del back


def test_parameters_of_a_model_being_built_count_nothing_until_they_are_loaded() -> None:
    device = simulated()
    with device.session():
        with device.building():
            model = nn.Linear(512, 512, bias=False, device="meta")
        views = [model.weight.t(), model.weight.detach()]
        assert (sizes(device), device.memory.host()) == ([], (0, 0)), "not by being looked at either"
        views.clear()
        model.weight = nn.Parameter(device.empty(MEBI_FLOATS, torch.float32))
        assert allocated(device) == MIB
        del model
        assert allocated(device) == 0


# --- libraries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "workspace"), [("h200", 32 * MIB), ("rtx4090", 8_519_680)])
def test_the_first_product_takes_the_workspace_of_its_card_and_the_second_none(gpu: str, workspace: int) -> None:
    device = simulated(gpu)
    with device.session():
        x, bias = device.empty(MEBI_FLOATS, torch.float32), device.empty((512,), torch.float32)
        start = len(sizes(device))
        outputs = [x @ x]
        assert sizes(device, start) == [MIB, workspace]
        outputs.append(torch.addmm(bias, x, x))
        assert sizes(device, start) == [MIB, workspace, MIB, MIB], "a fused bias adds cuBLASLt's own 1 MiB"
        outputs += [x @ x, torch.addmm(bias, x, x)]
        assert sizes(device, start + 4) == [MIB, MIB]
        outputs.clear()
        assert allocated(device) == MIB + 2048 + workspace + MIB, "the workspaces stay"


def test_attention_takes_seeds_and_workspace_on_h200_and_a_log_sum_exp_on_rtx4090() -> None:
    length, heads, width = 256, 12, 128
    output = length * heads * width * 2
    expected = {
        "h200": [8, 8, output, 256, -256, -8, -8],
        "rtx4090": [output, 4 * heads * length, 16, 8, -8, -16, -4 * heads * length],
    }
    for gpu, events in expected.items():
        device = simulated(gpu)
        with device.session():
            q = device.empty((length, heads, width), torch.bfloat16)
            start = len(sizes(device))
            out = attention(q, q, q)
            assert sizes(device, start) == events, gpu
            del out


def test_a_library_takes_device_memory_outside_the_allocator_once() -> None:
    device, gpu = simulated(), GPUS["h200"]
    with device.session():
        assert device.memory.device_memory() == gpu.context_bytes
        x = device.empty(MEBI_FLOATS, torch.float32)
        outputs = [x @ x, x @ x]
        modules = sum(gpu.module_bytes[name] for name in ("kernels", "cublas"))
        reserved = device.memory.read().reserved_bytes
        assert device.memory.device_memory() == gpu.context_bytes + modules + reserved
        outputs.clear()


# --- limits ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_what_was_requested_and_leaves_the_books_right() -> None:
    device = simulated(limit_bytes=outside("h200") + LATER_BYTES + 64 * MIB)
    with device.session():
        x = device.empty((40, *MEBI_FLOATS), torch.float32)
        with pytest.raises(OutOfMemory, match=r"30\.0 MiB.*40\.0 MiB allocated.*64\.0 MiB") as caught:
            device.empty((30, *MEBI_FLOATS), torch.float32)
        error = caught.value
        assert (error.requested_bytes, error.allocated_bytes, error.limit_bytes) == (30 * MIB, 40 * MIB, 64 * MIB)
        assert sizes(device) == [40 * MIB]
        assert [nbytes for nbytes, _ in device.memory.live.values()] == [40 * MIB]
        del x, caught, error
        assert allocated(device) == 0


def test_a_limit_under_the_cuda_context_holds_not_one_byte() -> None:
    device = simulated(limit_bytes=MIB)
    with device.session(), pytest.raises(OutOfMemory):
        device.empty((1,), torch.float32)


def test_a_card_without_a_limit_is_full_at_its_own_size() -> None:
    device = simulated("rtx4060")
    usable = GPUS["rtx4060"].total_bytes - outside("rtx4060")
    with device.session(), pytest.raises(OutOfMemory) as caught:
        device.empty((usable + 1,), torch.uint8)
    assert caught.value.limit_bytes == usable


@pytest.mark.parametrize(("stated", "usable"), [(48, 48.0), (24, 24 * 0.98), (None, 24 * 0.98)])
def test_a_card_with_more_memory_than_its_name_had_has_what_is_stated(stated: int | None, usable: float) -> None:
    device = simulated("rtx4090", None if stated is None else stated * GIB)
    free = int(usable * GIB) - outside("rtx4090")
    with device.session():
        kept = device.empty((free // MIB - 64, MIB), torch.uint8)
        with pytest.raises(OutOfMemory):
            device.empty((128, MIB), torch.uint8)
        assert allocated(device) >= kept.nbytes

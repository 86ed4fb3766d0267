"""`@pytest.mark.limit_vram("2 GiB")`: a test that takes more memory fails. For any project's PyTorch tests; pytest loads it by itself.

On CUDA the allocator of the current device is capped at the limit for the time of the test, so it runs out of memory where
it would exceed it. On the CPU, which has no allocator to cap, the bytes in live tensors are counted, but not those of
operations in other threads than the test's: PyTorch's dispatch modes are per thread. Under such a mode torch.jit.trace does
not work. Tensors on meta and fake tensors take nothing. `gpu="rtx4060"` runs the test on that card, simulated
(wanvram.simulated_gpu): `cuda` in it needs no GPU, and its allocator is capped at the limit.
`device="cpu"` or `device="cuda"` chooses; without it CUDA is taken
where there is one. Tensors that live before the test count too. The peak is in the test's report as the property
`vram_peak_bytes`. An exception of the test stays what it is, but for the one that the cap raises.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest

__all__ = ["pytest_configure", "pytest_runtest_call"]

MARKER = "limit_vram"


@dataclass(frozen=True)
class _Limit:
    nbytes: int
    device: str
    gpu: str | None = None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        'limit_vram(limit, device=None, gpu=None): the test fails if it takes more memory, e.g. limit_vram("2 GiB"); wanvram',
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return (yield)
    limit = _limit(marker)
    measured = _on_simulated(limit) if limit.gpu else _on_cuda(limit.nbytes) if limit.device == "cuda" else _on_cpu()
    next(measured)
    try:
        result = yield
    except BaseException as error:
        import torch

        peak = _finish_after_error(measured)
        # PyTorch's own, and no exception of the tested program with the same name.
        if limit.device == "cpu" or not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        pytest.fail(f"{_said(limit, peak)}: {'. '.join(str(error).split('. ')[:2])}")
    peak = _finish(measured)
    item.user_properties.append(("vram_peak_bytes", peak))
    if peak > limit.nbytes:
        pytest.fail(_said(limit, peak), pytrace=False)
    return result


def _limit(marker: pytest.Mark) -> _Limit:
    """Fails the test if its marker means nothing."""
    from wanvram.errors import InputError
    from wanvram.units import parse_memory

    device, gpu = marker.kwargs.get("device"), marker.kwargs.get("gpu")
    nbytes, why = 0, ""
    try:
        nbytes = parse_memory(str(marker.args[0])) if len(marker.args) == 1 else 0
    except InputError as error:
        why = f" ({error})"
    wrong = device not in (None, "cpu", "cuda") or not isinstance(gpu, (str, type(None))) or (gpu and device == "cpu")
    if nbytes < 1 or set(marker.kwargs) - {"device", "gpu"} or wrong:
        given = ", ".join([*map(repr, marker.args), *(f"{k}={v!r}" for k, v in marker.kwargs.items())])
        example = '@pytest.mark.limit_vram("2 GiB") or @pytest.mark.limit_vram("2 GiB", device="cpu")'
        pytest.fail(f"limit_vram({given}) means nothing{why}; write {example}", pytrace=False)
    if gpu is not None:
        return _Limit(nbytes, f"a simulated {gpu}", gpu)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("limit_vram: no CUDA device")
    return _Limit(nbytes, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _said(limit: _Limit, peak: int | None) -> str:
    from wanvram.units import human

    took = "more than its limit" if peak is None else human(peak)
    return f"limit_vram: the test took {took} on {limit.device}; its limit is {human(limit.nbytes)}"


def _finish(measured: Generator[int, None, None]) -> int:
    peak = next(measured)
    measured.close()
    return peak


def _finish_after_error(measured: Generator[int, None, None]) -> int | None:
    """None where the device does not answer any more, as after an assertion in a kernel: the test's exception says why."""
    try:
        return _finish(measured)
    except Exception:
        return None


def _on_cuda(nbytes: int) -> Generator[int, None, None]:
    """Yields twice: when the cap is set, and the peak of the bytes the allocator held for tensors since then."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    before = _fraction()  # a cap of the tested program stays, and holds within the test, too
    torch.cuda.set_per_process_memory_fraction(min(before, nbytes / total))
    try:
        yield 0
        torch.cuda.synchronize()
        yield int(torch.cuda.max_memory_allocated())
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


def _on_simulated(limit: _Limit) -> Generator[int, None, None]:
    """Yields twice, like `_on_cuda`; `cuda` between is the simulated card."""
    from wanvram.foreign.session import simulated_gpu

    assert limit.gpu is not None
    with simulated_gpu(limit.gpu) as gpu:
        gpu.memory.cap(limit.nbytes)
        yield 0
        yield gpu.peak.allocated_bytes


def _fraction() -> float:
    """Of the card that this process may use; 1 where PyTorch cannot say."""
    import torch

    try:
        return float(torch.cuda.get_per_process_memory_fraction())
    except (AttributeError, AssertionError, RuntimeError):
        return 1.0


def _on_cpu() -> Generator[int, None, None]:
    """Yields twice, like `_on_cuda`; the mode that counts is entered between."""
    from wanvram.recorder.meters import CpuMeter

    gc.collect()
    meter = CpuMeter(count_existing=True)
    with meter:
        meter.reset_peak()
        yield 0
        peak = meter.peak().allocated_bytes
    yield peak

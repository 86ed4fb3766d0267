"""The marker limit_vram as another project uses it: pytest in a folder of its own, with the plugin and nothing of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from wanvram import pytest_plugin
from wanvram.units import GIB, MIB

ON_THE_CPU = """
    import pytest, sys
    assert "torch" not in sys.modules, "the plugin alone must not load torch"
    import torch
    def mib(n): return torch.zeros(n * 2**20, dtype=torch.uint8)

    @pytest.fixture
    def model(): return mib(50)

    @pytest.mark.limit_vram("60 MiB", device="cpu")
    def test_small():
        for _ in range(5):
            mib(30)

    @pytest.mark.limit_vram("60 MiB", device="cpu")
    def test_large():
        kept = [mib(30) for _ in range(3)]

    @pytest.mark.limit_vram("60 MiB", device="cpu")
    def test_with_a_model(model):
        mib(20)

    @pytest.mark.limit_vram("1 GiB", device="cpu")
    def test_wrong():
        assert 1 == 2

    @pytest.mark.limit_vram("much")
    def test_bad_marker(): pass

    @pytest.mark.limit_vram("60 MiB", device="cpu")
    def test_without_memory():
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode():
            mib(8192) + 1
        torch.empty(2**33, device="meta") + 1

    class OutOfMemoryError(Exception): pass

    @pytest.mark.xfail(raises=OutOfMemoryError, strict=True)
    @pytest.mark.limit_vram("60 MiB", device="cpu")
    def test_an_exception_of_the_same_name():
        raise OutOfMemoryError

    @pytest.mark.limit_vram("60 MiB", device="cpu")
    def test_that_leaves_a_mode_on():
        from torch.utils._python_dispatch import TorchDispatchMode
        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))
        global left
        left = Mode()
        left.__enter__()
        mib(20)

    def test_and_one_that_takes_it_off():
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
        assert _get_current_dispatch_mode_stack() == [left]
        left.__exit__(None, None, None)

    def test_unmarked():
        mib(90)
"""
ON_CUDA = """
    import pytest, torch
    def mib(n): return torch.zeros(n * 2**20, dtype=torch.uint8, device="cuda")

    @pytest.mark.limit_vram("256 MiB")
    def test_small(): mib(100)

    @pytest.mark.limit_vram("256 MiB")
    def test_large(): mib(400)

    def test_after(): mib(400)
"""


def results(folder: Path, body: str) -> dict[str, tuple[str, dict[str, str]]]:
    """test -> (what the failure says, empty if it passed; properties)."""
    (folder / "test_them.py").write_text(textwrap.dedent(body))
    # By name and not by its entry point: the environment may be older than that.
    command = [sys.executable, "-m", "pytest", "-p", "wanvram.pytest_plugin", "--strict-markers", "--junitxml=r.xml"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120, check=False)
    found = {}
    for case in ElementTree.parse(folder / "r.xml").iter("testcase"):
        said = " ".join(f"{e.get('message')} {e.text}" for e in case if e.tag in ("failure", "error", "skipped"))
        found[str(case.get("name"))] = (said, {p.get("name", ""): p.get("value", "") for p in case.iter("property")})
    return found


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, str]]]:
    return results(tmp_path_factory.mktemp("cpu"), ON_THE_CPU)


def test_a_test_within_its_limit_passes_and_its_peak_is_in_the_report(on_the_cpu: dict[str, Any]) -> None:
    said, properties = on_the_cpu["test_small"]
    assert said == ""
    assert 30 * MIB <= int(properties["vram_peak_bytes"]) < 31 * MIB
    assert on_the_cpu["test_unmarked"][0] == ""


def test_a_test_beyond_its_limit_fails_with_both_figures(on_the_cpu: dict[str, Any]) -> None:
    said, properties = on_the_cpu["test_large"]
    assert "limit_vram: the test took 90.0 MiB on cpu; its limit is 60.0 MiB" in said
    assert int(properties["vram_peak_bytes"]) >= 90 * MIB


def test_tensors_of_a_fixture_count(on_the_cpu: dict[str, Any]) -> None:
    assert "the test took 70.0 MiB" in on_the_cpu["test_with_a_model"][0]


def test_fake_tensors_and_those_on_meta_take_nothing(on_the_cpu: dict[str, Any]) -> None:
    said, properties = on_the_cpu["test_without_memory"]
    assert said == ""
    assert int(properties["vram_peak_bytes"]) < MIB


def test_an_exception_of_the_program_named_as_pytorch_s_stays_the_program_s(on_the_cpu: dict[str, Any]) -> None:
    assert "limit_vram" not in on_the_cpu["test_an_exception_of_the_same_name"][0]


def test_a_mode_that_a_test_leaves_on_stays_on_and_the_plugin_s_own_goes(on_the_cpu: dict[str, Any]) -> None:
    assert on_the_cpu["test_that_leaves_a_mode_on"][0] == ""
    assert on_the_cpu["test_and_one_that_takes_it_off"][0] == ""


def test_an_error_of_the_test_stays_what_it_is(on_the_cpu: dict[str, Any]) -> None:
    assert "assert 1 == 2" in on_the_cpu["test_wrong"][0]
    assert "limit_vram: the test took" not in on_the_cpu["test_wrong"][0]


def test_a_marker_that_means_nothing_fails_its_test(on_the_cpu: dict[str, Any]) -> None:
    assert (
        "limit_vram('much') means nothing ('much' is not an amount of memory; write for example 8GiB, 8GB or 512MiB); write "
        '@pytest.mark.limit_vram("2 GiB")' in on_the_cpu["test_bad_marker"][0]
    )


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        (("much",), {}),
        ((), {}),
        (("1 GiB", 2), {}),
        (("1 GiB",), {"device": "tpu"}),
        ((0,), {}),
        ((5.5,), {}),
        (("8",), {}),
        (("1 GiB",), {"x": 1}),
    ],
)
def test_what_a_marker_may_say_is_checked(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    with pytest.raises(pytest.fail.Exception, match="means nothing"):
        pytest_plugin._limit(pytest.Mark("limit_vram", arguments, keywords, _ispytest=True))


def test_a_limit_may_be_text_or_bytes() -> None:
    for given in ("2 GiB", "2GB", 2 * GIB):
        mark = pytest.Mark("limit_vram", (given,), {"device": "cpu"}, _ispytest=True)
        assert pytest_plugin._limit(mark).nbytes == 2 * GIB


def fake_cuda(monkeypatch: pytest.MonkeyPatch, fraction: float | None = None) -> list[float]:
    """A card of 1000 MiB; the fractions that were set on it."""
    fractions: list[float] = []
    fake = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "synchronize": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: type("Properties", (), {"total_memory": 1000 * MIB}),
        "set_per_process_memory_fraction": fractions.append,
        "max_memory_allocated": lambda: 123,
    }
    if fraction is not None:
        fake["get_per_process_memory_fraction"] = lambda: fraction
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return fractions


def test_on_cuda_the_allocator_is_capped_for_the_test_and_freed_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = fake_cuda(monkeypatch)
    measured = pytest_plugin._on_cuda(250 * MIB)
    next(measured)
    assert fractions == [0.25]
    assert pytest_plugin._finish(measured) == 123
    assert fractions == [0.25, 1.0]


@pytest.mark.parametrize(("own", "during"), [(0.5, 0.25), (0.125, 0.125)])
def test_a_cap_of_the_program_s_own_holds_within_the_test_and_is_there_after_it(
    own: float, during: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fractions = fake_cuda(monkeypatch, own)
    measured = pytest_plugin._on_cuda(250 * MIB)
    next(measured)
    pytest_plugin._finish(measured)
    assert fractions == [during, own]


def test_the_test_s_exception_passes_where_cuda_no_longer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("device-side assert triggered")

    fake_cuda(monkeypatch)
    measured = pytest_plugin._on_cuda(250 * MIB)
    next(measured)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    assert pytest_plugin._finish_after_error(measured) is None


@pytest.mark.gpu
def test_on_a_gpu_exceeding_the_limit_is_a_failure_and_the_next_test_has_the_whole_card(tmp_path: Path) -> None:
    found = results(tmp_path, ON_CUDA)
    assert (found["test_small"][0], found["test_after"][0]) == ("", "")
    assert "on cuda; its limit is 256.0 MiB: CUDA out of memory" in found["test_large"][0]


ON_A_SIMULATED_CARD = """
    import pytest, torch

    @pytest.mark.limit_vram("64 MiB", gpu="rtx4060")
    def test_fits():
        assert torch.cuda.is_available()
        torch.nn.Linear(2048, 2048).cuda()

    @pytest.mark.limit_vram("64 MiB", gpu="rtx4060")
    def test_is_too_large():
        torch.zeros(100 << 20, dtype=torch.uint8, device="cuda")

    @pytest.mark.limit_vram("64 MiB", gpu="rtx4060")
    def test_fails_by_itself():
        torch.zeros(2, device="cuda")
        assert 1 == 2

    @pytest.mark.limit_vram("64 MiB", gpu="rtx1")
    def test_of_an_unknown_card(): pass

    def test_the_card_is_gone():
        assert torch.zeros(2).device.type == "cpu"
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda:7")
"""


def test_on_a_simulated_card_the_limit_holds_without_a_gpu(tmp_path: Path) -> None:
    found = results(tmp_path, ON_A_SIMULATED_CARD)
    assert found["test_fits"] == ("", {"vram_peak_bytes": str(2048 * 2049 * 4)})
    too_large = "limit_vram: the test took 0.0 MiB on a simulated rtx4060; its limit is 64.0 MiB: CUDA out of memory"
    assert found["test_is_too_large"][0].startswith((too_large, f"Failed: {too_large}"))
    assert "assert 1 == 2" in found["test_fails_by_itself"][0]
    assert "GPU 'rtx1' is unknown" in found["test_of_an_unknown_card"][0]
    assert found["test_the_card_is_gone"][0] == ""

"""`wanvram harvest`: which operations are watched, and a table that simulations obey; hostile tables are a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wanvram import simulated_gpu
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.foreign.harvest import LibraryWatch
from wanvram.foreign.measured import MeasuredDevice, MeasuredOperation, MeasuredTable, arguments_text

MIB = 1 << 20
H200 = MeasuredDevice("NVIDIA H200", (9, 0), 132, "2.11.0+cu130", 91900)


class Counted:
    """In place of the GPU's counters: every watched call takes a mebibyte more than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def reset(self) -> None:
        self.calls += 1

    def beyond(self) -> int:
        return self.calls * MIB


def convolve(device: str, layout: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
    with torch.no_grad():
        x = layout(torch.zeros(1, 16, 64, 64, device=device))
        weight = torch.zeros(32, 16, 3, 3, device=device)
        torch.nn.functional.conv2d(x, weight)


def harvested(code: Callable[[str], None]) -> MeasuredTable:
    watch = LibraryWatch(Counted(), place="cpu")
    with watch:
        code("cpu")
    return watch.table(H200)


def simulated(code: Callable[[str], None], table: Path | None = None) -> Any:
    with simulated_gpu("h200", measured=table) as gpu:
        code("cuda")
    return gpu


def written(table: MeasuredTable, path: Path) -> Path:
    table.write(path)
    return path


# --- watching ----------------------------------------------------------------------------------------------------------------


def test_convolutions_and_sorts_are_watched_and_what_has_exact_rules_is_not() -> None:
    def code(device: str) -> None:
        convolve(device)
        x = torch.randn(8, 100, device=device)
        torch.sort(x @ x.t() + 1, dim=1, descending=True)
        nn.Linear(100, 8, device=device)(x).softmax(-1)

    assert {entry.operation for entry in harvested(code).operations} == {
        "aten.convolution.default",
        "aten.sort.default",
    }


def test_calls_of_equal_arguments_are_one_entry_with_the_most_that_was_taken() -> None:
    def code(device: str) -> None:
        for _ in range(3):
            convolve(device)

    (entry,) = harvested(code).operations
    assert (entry.bytes, entry.calls) == (3 * MIB, 3)
    assert entry.arguments.startswith("float32 1x16x64x64 contiguous, float32 32x16x3x3 contiguous, -, [1 1]")


def test_tensors_on_another_device_do_not_count() -> None:
    watch = LibraryWatch(Counted(), place="cuda")
    with watch:
        convolve("cpu")
    assert watch.table(H200).operations == ()


def test_a_custom_operation_is_watched_whole() -> None:
    @torch.library.custom_op("wanvram_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.sort().values * 2

    def code(device: str) -> None:
        twice(torch.ones(4, device=device))

    names = {entry.operation for entry in harvested(code).operations}
    assert "wanvram_test.twice.default" in names


# --- obeying -----------------------------------------------------------------------------------------------------------------


def test_a_simulation_counts_what_was_measured_in_place_of_the_rule(tmp_path: Path) -> None:
    plain = simulated(convolve)
    assert plain.peak.basis == "estimated"
    assert plain.gaps
    table = written(harvested(convolve), tmp_path / "t.json")
    gpu = simulated(convolve, table)
    tensors = 4 * (16 * 64 * 64 + 32 * 62 * 62) + 32 * 16 * 9 * 4
    assert abs(gpu.peak.allocated_bytes - (tensors + MIB)) < 4 * 512
    assert gpu.peak.basis == "measured"
    assert gpu.peak.low_bytes == gpu.peak.high_bytes == gpu.peak.reserved_bytes
    assert gpu.gaps == ()
    assert "as measured on NVIDIA H200, torch 2.11.0+cu130, cuDNN 91900: 1 of aten.convolution" in gpu.report()


def test_of_a_strided_input_the_copy_is_counted_once(tmp_path: Path) -> None:
    def code(device: str) -> None:
        convolve(device, lambda x: x.transpose(2, 3))

    (entry,) = harvested(code).operations
    assert " strided, " in entry.arguments
    taken = MeasuredOperation(entry.operation, entry.arguments, 2 * MIB, 1)
    gpu = simulated(code, written(MeasuredTable(H200, [taken]), tmp_path / "t.json"))
    tensors = 4 * (16 * 64 * 64 + 32 * 62 * 62) + 32 * 16 * 9 * 4
    assert abs(gpu.peak.allocated_bytes - (tensors + 2 * MIB)) < 4 * 512


def test_other_shapes_layouts_and_types_keep_the_rule_and_say_so(tmp_path: Path) -> None:
    table = written(harvested(convolve), tmp_path / "t.json")

    def other(device: str) -> None:
        convolve(device)
        with torch.no_grad():
            nn.Conv2d(16, 8, 3, device=device)(torch.zeros(1, 16, 9, 9, device=device))

    gpu = simulated(other, table)
    assert gpu.peak.basis == "estimated"
    assert any("convolution 2d float32 contiguous" in gap for gap in gpu.gaps)


def test_where_some_calls_were_not_measured_the_figure_is_no_measured_one(tmp_path: Path) -> None:
    def both(device: str) -> None:
        convolve(device)
        convolve(device, lambda x: x.to(memory_format=torch.channels_last))

    gpu = simulated(both, written(harvested(convolve), tmp_path / "t.json"))
    assert gpu.peak.basis == "estimated"
    assert any("1 calls with arguments that the measured table has not" in gap for gap in gpu.gaps)


def test_an_operation_whose_temporaries_are_unknown_is_no_gap_once_measured(tmp_path: Path) -> None:
    def code(device: str) -> None:
        torch.randn(4, 1000, device=device).topk(3)

    assert any("aten.topk" in gap for gap in simulated(code).gaps)
    gpu = simulated(code, written(harvested(code), tmp_path / "t.json"))
    assert gpu.gaps == ()
    assert gpu.peak.allocated_bytes >= MIB


def test_a_table_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = written(harvested(convolve), tmp_path / "t.json")
    with (
        pytest.raises(InputError, match=r"NVIDIA H200 \(sm_90\), not of NVIDIA GeForce RTX 4090 \(sm_89\)"),
        simulated_gpu("rtx4090", measured=path),
    ):
        pass
    assert not torch.cuda.is_available()


# --- files -------------------------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = harvested(convolve)
    again = MeasuredTable.read(written(table, tmp_path / "t.json"))
    assert (again.device, again.operations) == (table.device, table.operations)


GOOD: dict[str, Any] = {
    "schema": 1,
    "device": {"gpu": "NVIDIA H200", "compute_capability": [9, 0], "multiprocessors": 132, "torch": "2", "cudnn": 9},
    "operations": [{"operation": "aten.sort.default", "arguments": "", "bytes": 5, "calls": 1}],
}
ENTRY: dict[str, Any] = GOOD["operations"][0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no table of schema 1"),
        (GOOD | {"schema": 2}, "no table of schema 1"),
        (GOOD | {"device": None}, "device is null"),
        (GOOD | {"device": GOOD["device"] | {"compute_capability": [9]}}, "compute_capability is a group of 1"),
        (GOOD | {"device": GOOD["device"] | {"cudnn": "9"}}, "device.cudnn is '9'"),
        (GOOD | {"operations": {}}, "operations is a section"),
        (GOOD | {"operations": ["x"]}, "operations.0 is 'x'"),
        (GOOD | {"operations": [ENTRY | {"bytes": -1}]}, "operations.0.bytes is -1, outside"),
        (GOOD | {"operations": [ENTRY | {"bytes": 1 << 50}]}, "outside 0..1099511627776"),
        (GOOD | {"operations": [ENTRY | {"bytes": 0.5}]}, "operations.0.bytes is 0.5"),
        (GOOD | {"operations": [{"operation": "aten.sort.default"}]}, "'arguments' is missing"),
        ('{"schema": 1, "operations": [{"bytes": 1e999}]}', "is too large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_table_is_a_sentence(content: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        MeasuredTable.read(path)
    assert "t.json is no table that wanvram harvest wrote: " in str(caught.value)
    assert sentence in str(caught.value)


def test_devices_and_lists_in_arguments_are_written_alike_for_both_cards() -> None:
    real = arguments_text((None, [1, 2], True, torch.device("cuda", 0)), {"b": 1, "a": torch.float16})
    assert real == arguments_text((None, (1, 2), True, torch.device("meta")), {"a": torch.float16, "b": 1})


# --- the command -------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_command_says_so_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("print('ran')", encoding="utf-8")
    assert main(["harvest", "absent.py"]) == 2
    assert capsys.readouterr().err == "wanvram: absent.py is no file\n"
    assert main(["harvest", "script.py"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("wanvram: no library was measured: ")
    assert not (tmp_path / "measured.json").exists()
    (tmp_path / "measured.json").write_text("precious", encoding="utf-8")
    assert main(["harvest", "script.py"]) == 2
    assert "give --force to replace it" in capsys.readouterr().err


def test_the_command_writes_what_the_script_took_also_where_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanvram.foreign import harvest

    monkeypatch.setattr(harvest, "measuring_device", lambda: H200)
    monkeypatch.setattr(harvest, "LibraryWatch", lambda: LibraryWatch(Counted(), place="cpu"))
    script, out = tmp_path / "script.py", tmp_path / "table.json"
    script.write_text("import torch\nprint('own')\ntorch.ones(9).sort()\nraise ValueError('its own')", encoding="utf-8")
    assert main(["harvest", "-o", str(out), str(script)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "own\n"
    assert "ValueError: its own" in captured.err
    assert "1 operations measured on NVIDIA H200" in captured.err
    assert [entry.operation for entry in MeasuredTable.read(out).operations] == ["aten.sort.default"]
    assert main(["harvest", "--json", str(script)]) == 1
    assert json.loads(capsys.readouterr().out)["operations"][0]["bytes"] == MIB
